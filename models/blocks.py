"""The transformer block: MAR's (pre-norm attention and MLP, timm's parameter names) plus RoPE, an attention bias and
gated cross-attention to the caption. Every addition is the identity when its gate or strength is 0.

    x = x + Attn(N(x));  x = x + tanh(g) CrossAttn(N(x), text);  x = x + MLP(N(x))

With `norm_position` res_post the norms of attention and MLP stand behind them, x + N(F(x)), so that a block adds no
more than its norms' weights allow (Swin v2, arXiv:2111.09883; Chameleon, arXiv:2405.09818). Queries and keys may be
normed before they turn. The other options: `config.py`.

A block's `forward` computes rotations and text keys and values itself, as training needs; its `run` is given them, so
that sampling computes them once (`models/context.py`).

Shape letters: B batch, H heads, n tokens, D width, d head width, T text tokens, C text channels, R rows with text,
p tokens asked for, m tokens attended to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers.mlp import Mlp, SwiGLU
from torch import Tensor, nn

from models.attention_maps import AttentionWatch
from models.config import StructMARConfig
from models.norms import build_norm, build_qk_norm
from models.rope import Rotation

GATED_UNIT = 256  # a gated MLP's width is a multiple of it (LLaMA, arXiv:2302.13971)


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` of each image. x: [B, L, D]; ids: [B, n]; returns [B, n, D]."""
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))  # [B, n, D]


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, n, D] -> [B, H, n, d]."""
    batch_size, length, width = x.shape
    return x.view(batch_size, length, num_heads, width // num_heads).transpose(1, 2)  # [B, H, n, d]


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, n, d] -> [B, n, D]."""
    return x.transpose(1, 2).flatten(2)  # [B, n, D]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v. q: [B, H, n, d]; k, v: [B, H, m, d]; mask: added, or bool; gives [B, H, n, d].

    PyTorch's fused kernel, except in bfloat16 on a CPU, where its backward pass takes 3 to 8 times as long as products
    that keep the weights (PyTorch 2.14).
    """
    if q.dtype != torch.bfloat16 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)  # [B, H, n, d]
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [B, H, n, m]
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask  # [B, H, n, m]
    weights = logits.softmax(-1, dtype=torch.float32).to(q.dtype)  # [B, H, n, m]
    return F.dropout(weights, dropout) @ v  # [B, H, n, d]


class Attention(nn.Module):
    """Self-attention over buffer and image tokens. `rope_strength` exists when it is learned (`rope_mode` gated)."""

    def __init__(self, config: StructMARConfig, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attn_dropout = config.attn_dropout
        self.qkv = nn.Linear(width, 3 * width, bias=config.linear_bias)
        self.q_norm = build_qk_norm(config.qk_norm, num_heads, width // num_heads)
        self.k_norm = build_qk_norm(config.qk_norm, num_heads, width // num_heads)
        self.proj = nn.Linear(width, width, bias=config.linear_bias)
        self.proj_drop = nn.Dropout(config.proj_dropout)
        self.rope_mode = config.rope_mode
        if config.rope_mode == "gated":
            self.rope_strength = nn.Parameter(torch.zeros(1))

    def rotation(self, angles: Tensor) -> Rotation:
        """angles: [..., n, d/2], at the full strength."""
        return Rotation.by(angles * self.rope_strength if self.rope_mode == "gated" else angles)

    def project(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, normed and turned, and values. x: [B, n, D]; each [B, H, n, d]."""
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))  # each [B, H, n, d]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)  # [B, H, n, d]
        if rotation is not None:
            q, k = rotation(q), rotation(k)  # [B, H, n, d]
        return q, k, v

    def attend(
        self,
        x: Tensor,
        rotation: Rotation | None,
        bias: Tensor | None,
        query_ids: Tensor | None = None,
        value_scale: Tensor | None = None,
    ) -> Tensor:
        """x: [B, n, D]; bias: [B, 1, n, n]; query_ids: [B, p], the tokens to compute (None: all); gives [B, p, D].

        value_scale: [B, N], factors on the probabilities towards the first N tokens, behind the softmax: the others
        keep theirs. They are put on the values, which comes to the same.
        """
        q, k, v = self.project(x, rotation)  # each [B, H, n, d]
        if value_scale is not None:
            num_scaled = value_scale.shape[1]
            scaled = v[:, :, :num_scaled] * value_scale[:, None, :, None].to(v.dtype)  # [B, H, N, d]
            v = torch.cat([scaled, v[:, :, num_scaled:]], dim=2)  # [B, H, n, d]
        if query_ids is not None:
            rows = query_ids[:, None, :, None]  # [B, 1, p, 1]
            q = q.gather(2, rows.expand(-1, q.shape[1], -1, q.shape[3]))  # [B, H, p, d]
            bias = None if bias is None else bias.gather(2, rows.expand(-1, -1, -1, bias.shape[3]))  # [B, 1, p, n]
        mask = None if bias is None else bias.to(q.dtype)  # [B, 1, p, n]
        dropout = self.attn_dropout if self.training else 0.0
        x = attention(q, k, v, mask, dropout)  # [B, H, p, d]
        return self.proj_drop(self.proj(merge_heads(x)))  # [B, p, D]


@dataclass(frozen=True)
class TextKV:
    """Keys and values of the captions in one layer of cross-attention.

    keys, values: [R, H, T, d] of the first R images; valid: [R, T] bool, at least one per row. null: [D], what every
    token of the images after them gets (`GatedCrossAttention.of_null`). watch: sees what is attended by, or None.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor
    null: Tensor | None = None
    watch: AttentionWatch | None = None

    def first(self, num_images: int) -> TextKV:
        null = self.null if num_images > len(self.keys) else None
        return TextKV(self.keys[:num_images], self.values[:num_images], self.valid[:num_images], null, self.watch)


class GatedCrossAttention(nn.Module):
    """`tanh(g) * CrossAttn(N(x), text)`; g starts at 0 (not the output projection too: neither would learn)."""

    def __init__(self, config: StructMARConfig, width: int, num_heads: int, text_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = build_norm(config.norm, width)
        self.q = nn.Linear(width, width, bias=config.linear_bias)
        self.kv = nn.Linear(text_dim, 2 * width, bias=config.linear_bias)
        self.proj = nn.Linear(width, width, bias=config.linear_bias)
        self.gate = nn.Parameter(torch.zeros(1))

    def keys_values(self, text: Tensor, text_valid: Tensor, null: Tensor | None = None) -> TextKV:
        """text: [R, T, C]; null: the token [C] that stands in for the text of all further images."""
        keys, values = (split_heads(part, self.num_heads) for part in self.kv(text).chunk(2, dim=-1))  # [R, H, T, d]
        return TextKV(keys, values, text_valid, None if null is None else self.of_null(null))

    def of_null(self, null: Tensor) -> Tensor:
        """Attention to a single token gives its value, whoever asks: a constant. null: [C]; returns [D]."""
        return torch.tanh(self.gate) * self.proj(self.kv(null).chunk(2, dim=-1)[1])  # [D]

    def attend(self, x: Tensor, text_kv: TextKV) -> Tensor:
        """[B, n, D] -> [B, n, D]."""
        num_with_text = len(text_kv.keys)
        q = split_heads(self.q(self.norm(x[:num_with_text])), self.num_heads)  # [R, H, n, d]
        if text_kv.watch is not None:
            text_kv.watch.see(q, text_kv.keys, text_kv.valid, self.gate)
        mask = text_kv.valid[:, None, None, :]  # [R, 1, 1, T]
        seen = attention(q, text_kv.keys, text_kv.values, mask)  # [R, H, n, d]
        seen = torch.tanh(self.gate) * self.proj(merge_heads(seen))  # [R, n, D]
        if text_kv.null is None:
            return seen
        constant = text_kv.null.expand(len(x) - num_with_text, x.shape[1], -1)  # [B - R, n, D]
        return torch.cat([seen, constant])  # [B, n, D]


def build_mlp(config: StructMARConfig, width: int) -> nn.Module:
    """timm's MLP, or its SwiGLU of about as many parameters: two thirds of the width, rounded up to 256s."""
    hidden, dropout = int(width * config.mlp_ratio), config.proj_dropout
    if config.mlp == "gelu":
        return Mlp(width, hidden, bias=config.linear_bias, drop=dropout)
    gated = math.ceil(int(2 * hidden / 3) / GATED_UNIT) * GATED_UNIT
    return SwiGLU(width, gated, bias=config.linear_bias, drop=(0.0, dropout))


class Block(nn.Module):
    """One transformer block of the trunk. `cross` exists when the block attends to the caption."""

    def __init__(self, config: StructMARConfig, width: int, num_heads: int, text_dim: int) -> None:
        super().__init__()
        self.is_post = config.norm_position == "res_post"
        self.norm1 = build_norm(config.norm, width)
        self.attn = Attention(config, width, num_heads)
        self.cross = GatedCrossAttention(config, width, num_heads, text_dim) if text_dim else None
        self.norm2 = build_norm(config.norm, width)
        self.mlp = build_mlp(config, width)

    def forward(
        self,
        x: Tensor,
        angles: Tensor | None,
        bias: Tensor | None,
        text: Tensor | None,
        text_valid: Tensor | None,
        query_ids: Tensor | None = None,
        value_scale: Tensor | None = None,
    ) -> Tensor:
        """x: [B, n, D]; angles: [B or 1, n, d/2]; text: [B, T, C]; the rest and what it gives: see `run`."""
        rotation = None if angles is None else self.attn.rotation(angles)
        text_kv = None
        if self.cross is not None and text is not None and text_valid is not None:
            text_kv = self.cross.keys_values(text, text_valid)
        return self.run(x, rotation, bias, text_kv, query_ids, value_scale)  # [B, p, D]

    def run(
        self,
        x: Tensor,
        rotation: Rotation | None,
        bias: Tensor | None,
        text_kv: TextKV | None,
        query_ids: Tensor | None = None,
        value_scale: Tensor | None = None,
    ) -> Tensor:
        """x: [B, n, D]; bias: [B, 1, n, n]; query_ids: [B, p], the tokens to compute (None: all); value_scale: [B, N],
        see `Attention.attend`; gives [B, p, D]."""
        if self.is_post:
            update = self.norm1(self.attn.attend(x, rotation, bias, query_ids, value_scale))  # [B, p, D]
        else:
            update = self.attn.attend(self.norm1(x), rotation, bias, query_ids, value_scale)  # [B, p, D]
        x = update + (x if query_ids is None else gather_tokens(x, query_ids))  # [B, p, D]
        if self.cross is not None and text_kv is not None:
            x = x + self.cross.attend(x, text_kv)  # [B, p, D]
        return x + (self.norm2(self.mlp(x)) if self.is_post else self.mlp(self.norm2(x)))  # [B, p, D]
