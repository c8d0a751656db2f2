"""The size condition: how large the picture is, how large the image was that it was cut out of, and where.

    e = MLP([f(x_1) ... f(x_6)]),  f: cos and sin at 128 frequencies

Sizes in pixels as in SDXL (arXiv:2307.01952, section 2.2), whose six numbers these are. The last linear starts at zero,
so that a model just built is the one without.

Shape letters: B batch, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.heads.adaln_mlp import TIME_FREQUENCIES, timestep_features
from util.types import NUM_SIZES, SizeBatch


class SizeEmbedder(nn.Module):
    """Sizes to what is added to the base condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        output = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(NUM_SIZES * TIME_FREQUENCIES, width), nn.SiLU(), output)
        nn.init.zeros_(output.weight)
        nn.init.zeros_(output.bias)

    def forward(self, sizes: SizeBatch) -> Tensor:
        """Returns [B, D]."""
        features = timestep_features(sizes.values.flatten()).unflatten(0, sizes.values.shape)  # [B, 6, 256]
        embedded: Tensor = self.mlp(features.flatten(1))  # [B, D]
        return embedded


def pixels_of_grid(grid: tuple[int, int], step: int) -> tuple[int, int]:
    """(height, width) of a picture whose tokens are `step` pixels wide."""
    return grid[0] * step, grid[1] * step


def are_named(batch_size: int, device: torch.device, *parts: Tensor | None) -> Tensor:
    """parts: [B, any] bool each, or None. Returns [B, 1] bool: whether one of them names something for the image."""
    named = torch.zeros(batch_size, 1, dtype=torch.bool, device=device)  # [B, 1]
    for part in parts:
        if part is not None:
            named = named | part.any(dim=1, keepdim=True)  # [B, 1]
    return named  # [B, 1]
