"""Captions and codes for tiny MARS models."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from models.mars.losses import Pairs
from models.mars.model import TextBatch
from tests.helpers.language_models import GRID, NUM_CODES

BOS, EOS = 1, 2
CAPTIONS = ((4, 5), (6, 7, 8, 9))


def some_codes(batch_size: int, seed: int = 1, grid: tuple[int, int] = GRID) -> torch.Tensor:
    """[B, L] int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(NUM_CODES, (batch_size, grid[0] * grid[1]), generator=generator)


def pairs(captions: Sequence[Sequence[int]] = CAPTIONS, codes: torch.Tensor | None = None) -> Pairs:
    """Captions of unequal lengths, so that both sides are padded."""
    return Pairs(
        some_codes(len(captions)) if codes is None else codes,
        TextBatch.of([[BOS, *caption] for caption in captions], "left"),
        torch.tensor([BOS]),
        TextBatch.of([[*caption, EOS] for caption in captions], "right"),
        torch.tensor([bool(caption) for caption in captions]),
    )
