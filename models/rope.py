"""2D rotary position embedding of image tokens (RoFormer, arXiv:2104.09864, once per axis).

A head's channels split in two halves: the first rotates with x (column), the second with y (row), or (`yx`, as in
LlamaGen) the other way round. Within a half, the interleaved pair i turns by `position * 10000^(-2i / (d_h / 2))`. A
learnable strength multiplies the angles: 0 is the identity, 1 the full rotation. Buffer tokens stand nowhere in the
image, so their angles are 0. On grids of other sizes than in training, positions may be scaled (`fit_scale`).

Shape letters: B batch, H heads, n tokens, d head width, L image tokens, K buffer slots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def rope_angles_2d(
    grid: tuple[int, int], head_dim: int, base: float = 10000.0, axes: str = "xy", scale: float = 1.0
) -> Tensor:
    """Angles in radians of every token of an (h, w) grid in raster order: [h * w, head_dim / 2] float32. axes: of
    `config.ROPE_AXES`. scale: on both positions."""
    if head_dim % 4:
        raise ValueError(f"2D RoPE needs a head width divisible by 4, got {head_dim}")
    height, width = grid
    pairs = head_dim // 4
    frequencies = base ** (-2 * torch.arange(pairs, dtype=torch.float32) / (head_dim / 2))  # [d/4]
    columns = scale * torch.arange(width, dtype=torch.float32).repeat(height)  # [L]
    rows = scale * torch.arange(height, dtype=torch.float32).repeat_interleave(width)  # [L]
    halves = [columns[:, None] * frequencies, rows[:, None] * frequencies]  # [L, d/4] each
    return torch.cat(halves if axes == "xy" else halves[::-1], dim=-1)  # [L, d/2]


def fit_scale(grid: tuple[int, int], trained: tuple[int, int]) -> float:
    """The factor on positions by which both (h, w) grids cover as large an area."""
    return math.sqrt(math.prod(trained) / math.prod(grid))


def with_buffer(angles: Tensor, buffer_size: int) -> Tensor:
    """Puts the buffer tokens, which do not rotate, in front. [..., n, d/2] -> [..., K + n, d/2]."""
    still = angles.new_zeros(*angles.shape[:-2], buffer_size, angles.shape[-1])  # [..., K, d/2]
    return torch.cat([still, angles], dim=-2)  # [..., K + n, d/2]


@dataclass(frozen=True)
class Rotation:
    """Turns each interleaved channel pair by its angle. cos, sin: [B or 1, n, d/2] float32."""

    cos: Tensor
    sin: Tensor

    @staticmethod
    def by(angles: Tensor) -> Rotation:
        """angles: [B or 1, n, d/2]."""
        return Rotation(angles.cos(), angles.sin())

    def at(self, positions: Tensor) -> Rotation:
        """The rows of a table of one image ([1, n, d/2]) at positions [B, m]: [B, m, d/2]."""
        return Rotation(self.cos[0][positions], self.sin[0][positions])

    def __call__(self, x: Tensor) -> Tensor:
        """[B, H, n, d], turned in float32.

        A complex multiplication is one kernel forwards and one backwards; the compiler has none, and fuses real ones.
        """
        cos, sin = self.cos[:, None], self.sin[:, None]  # [B, 1, n, d/2]
        pairs = x.float().unflatten(-1, (-1, 2))  # [B, H, n, d/2, 2]
        if torch.compiler.is_compiling():
            even, odd = pairs.unbind(-1)  # [B, H, n, d/2]
            turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)  # [B, H, n, d/2, 2]
        else:
            turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))  # [B, H, n, d/2, 2]
        return turned.flatten(-2).to(x.dtype)  # [B, H, n, d]
