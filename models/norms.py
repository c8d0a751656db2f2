"""Norms of the trunk's tokens, and of queries and keys (Chameleon, arXiv:2405.09818: large values would grow on).

Shape letters: B batch, H heads, n tokens, D width, d head width.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RMS_EPS = 1e-5

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in float32, then times a weight (arXiv:1910.07467)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return rms_normalized(x) * self.weight  # [..., D]


def rms_normalized(x: Tensor) -> Tensor:
    """x over the root of its mean square along the last dimension, in x's own dtype. [..., D] -> [..., D]."""
    wide = x.float()  # [..., D]
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + RMS_EPS)).to(x.dtype)  # [..., D]


def build_norm(kind: str, width: int) -> nn.Module:
    """kind: of `config.NORMS`."""
    return RmsNorm(width) if kind == "rms" else LayerNorm(width)


class HeadNorm(nn.Module):
    """A norm of queries or keys over each head's channels, with a weight (and, for layer, a bias) per head and channel:
    [D], head by head. Its result has the dtype of its input."""

    def __init__(self, kind: str, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.shape = (num_heads, 1, head_dim)
        self.weight = nn.Parameter(torch.ones(num_heads * head_dim))
        self.bias = nn.Parameter(torch.zeros(num_heads * head_dim)) if kind == "head_layer" else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, n, d] -> [B, H, n, d]."""
        weight = self.weight.view(self.shape)  # [H, 1, d]
        if self.bias is None:
            return (rms_normalized(x) * weight).to(x.dtype)  # [B, H, n, d]
        normalized = F.layer_norm(x.float(), x.shape[-1:], eps=RMS_EPS)  # [B, H, n, d]
        return (normalized * weight + self.bias.view(self.shape)).to(x.dtype)  # [B, H, n, d]


class FullNorm(nn.Module):
    """RMS over all heads' channels together, without a weight (Halton-MaskGIT, arXiv:2503.17076)."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, n, d] -> [B, H, n, d]."""
        wide = x.float()  # [B, H, n, d]
        return (wide * torch.rsqrt(wide.square().mean((1, 3), keepdim=True) + RMS_EPS)).to(x.dtype)  # [B, H, n, d]


def build_qk_norm(kind: str, num_heads: int, head_dim: int) -> nn.Module | None:
    """kind: of `config.QK_NORMS`; None where it is none."""
    if kind == "none":
        return None
    return FullNorm() if kind == "full_rms" else HeadNorm(kind, num_heads, head_dim)
