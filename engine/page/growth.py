"""A picture while it is drawn: what is known of it decoded, the rest transparent.

Decoding takes time that nobody asked for, so it takes at most as much as the iterations themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from engine.sample.editing import Starts
from engine.sample.pipeline import StructMARPipeline
from util.images import Picture

HIDDEN = 0  # opacity of what is not known yet


class Growth:
    """Called with every iteration of one batch. tell: gets the iteration, counted from 1, and the batch's pictures
    [H, W, 4] with transparency, or None where there was no time for them."""

    def __init__(
        self,
        pipeline: StructMARPipeline,
        grid: tuple[int, int],
        starts: Starts | None,
        tell: Callable[[int, list[Picture] | None], None],
    ) -> None:
        """grid: (rows, columns) of the trunk's tokens."""
        self.pipeline, self.grid, self.starts, self.tell = pipeline, grid, starts, tell
        self.count = 0
        self._seconds = 0.0  # that the last pictures took
        self._since = time.monotonic()

    def __call__(self, _iteration: int, tokens: Tensor) -> None:
        self.count += 1
        begun = time.monotonic()
        if begun - self._since < self._seconds:
            self.tell(self.count, None)
            return
        pictures = self._pictures(tokens)
        self._since = time.monotonic()
        self._seconds = self._since - begun
        self.tell(self.count, pictures)

    @torch.no_grad()
    def _pictures(self, tokens: Tensor) -> list[Picture]:
        """tokens: [B, L, C]."""
        model = self.pipeline.model
        drawn = self.pipeline.pictures(model.unpatchify(tokens, self.grid).float(), self.starts)
        empty = model.head.empty_tokens(tokens.shape[0], tokens.shape[1], tokens.device)  # [B, L, C]
        known = (tokens != empty).any(-1)  # [B, L]
        if self.starts is not None:
            known |= torch.cat([start.known.known for start in self.starts]).to(known.device)
        rows, columns = model.config.unit_grid(self.grid)
        shown = known.view(-1, rows, columns).cpu().numpy()
        return [_with_opacity(picture, cells) for picture, cells in zip(drawn, shown, strict=True)]


def _with_opacity(picture: Picture, cells: np.ndarray) -> Picture:
    """cells: [rows, columns] bool, which of them are shown."""
    height, width = picture.shape[:2]
    cell = np.ones((height // cells.shape[0], width // cells.shape[1]), dtype=bool)
    opacity = np.where(np.kron(cells, cell), 255, HIDDEN).astype(np.uint8)
    return np.concatenate([picture, opacity[..., None]], axis=2)
