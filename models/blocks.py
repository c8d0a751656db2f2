"""The transformer block: MAR's (pre-norm attention and MLP, timm's parameter names) plus RoPE, an attention bias and
gated cross-attention to the caption. Every addition is the identity when its gate or strength is 0.

    x = x + Attn(LN(x));  x = x + tanh(g) CrossAttn(LN(x), text);  x = x + MLP(LN(x))

Shape letters: B batch, H heads, n tokens, D width, d head width, T text tokens, C text channels.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from models.rope import apply_rope

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, n, D] -> [B, H, n, d]."""
    batch_size, length, width = x.shape
    return x.view(batch_size, length, num_heads, width // num_heads).transpose(1, 2)  # [B, H, n, d]


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, n, d] -> [B, n, D]."""
    return x.transpose(1, 2).flatten(2)  # [B, n, D]


class Attention(nn.Module):
    """Self-attention over buffer and image tokens. `rope_strength` exists when it is learned (`rope_mode` gated)."""

    def __init__(self, width: int, num_heads: int, attn_dropout: float, proj_dropout: float, rope_mode: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attn_dropout = attn_dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(proj_dropout)
        self.rope_mode = rope_mode
        if rope_mode == "gated":
            self.rope_strength = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, angles: Tensor | None, bias: Tensor | None) -> Tensor:
        """x: [B, n, D]; angles: [B or 1, n, d/2]; bias: [B, 1, n, n]; returns [B, n, D]."""
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))  # each [B, H, n, d]
        if angles is not None:
            angles = angles * self.rope_strength if self.rope_mode == "gated" else angles  # [B, n, d/2]
            q, k = apply_rope(q, angles), apply_rope(k, angles)  # [B, H, n, d]
        mask = None if bias is None else bias.to(q.dtype)  # [B, 1, n, n]
        dropout = self.attn_dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)  # [B, H, n, d]
        return self.proj_drop(self.proj(merge_heads(x)))  # [B, n, D]


class GatedCrossAttention(nn.Module):
    """`tanh(g) * CrossAttn(LN(x), text)`; g starts at 0 (not the output projection too: neither would learn)."""

    def __init__(self, width: int, num_heads: int, text_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(text_dim, 2 * width)
        self.proj = nn.Linear(width, width)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, text: Tensor, text_valid: Tensor) -> Tensor:
        """x: [B, n, D]; text: [B, T, C]; text_valid: [B, T] bool, at least one per row; returns [B, n, D]."""
        q = split_heads(self.q(self.norm(x)), self.num_heads)  # [B, H, n, d]
        k, v = (split_heads(part, self.num_heads) for part in self.kv(text).chunk(2, dim=-1))  # each [B, H, T, d]
        mask = text_valid[:, None, None, :]  # [B, 1, 1, T]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B, H, n, d]
        return torch.tanh(self.gate) * self.proj(merge_heads(x))  # [B, n, D]


class Block(nn.Module):
    """One transformer block. `cross` exists when the block attends to the caption."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        attn_dropout: float,
        proj_dropout: float,
        rope_mode: str,
        text_dim: int,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn = Attention(width, num_heads, attn_dropout, proj_dropout, rope_mode)
        self.cross = GatedCrossAttention(width, num_heads, text_dim) if text_dim else None
        self.norm2 = LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio), drop=proj_dropout)

    def forward(
        self,
        x: Tensor,
        angles: Tensor | None,
        bias: Tensor | None,
        text: Tensor | None,
        text_valid: Tensor | None,
    ) -> Tensor:
        """x: [B, n, D]; angles: [B or 1, n, d/2]; bias: [B, 1, n, n]; text: [B, T, C]; returns [B, n, D]."""
        x = x + self.attn(self.norm1(x), angles, bias)  # [B, n, D]
        if self.cross is not None:
            x = x + self.cross(x, text, text_valid)  # [B, n, D]
        return x + self.mlp(self.norm2(x))  # [B, n, D]
