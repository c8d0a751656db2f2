"""Edits side by side: the picture with its boxes, the cells that are drawn anew, the picture afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from engine.data.scenes import Scene
from engine.sample.editing import Edit
from engine.sample.grid import caption_bands
from engine.sample.holes import known_cells
from util.images import WHITE, Picture, draw_boxes, make_grid

VEIL = 0.25  # how much is left of a cell that is drawn anew
GAP = 8


@dataclass(frozen=True)
class Shown:
    """One row. before, after: the scenes of both pictures; edit: what was drawn anew of the first; cell: px."""

    before: Scene
    edit: Edit
    cell: int
    after: Scene
    picture: Picture
    caption: str


def hidden_pixels(edit: Edit, cell: int) -> np.ndarray:
    """bool [H, W]: the pixels of the cells, of `cell` px, that are drawn anew."""
    shape = edit.hole.shape[0] // cell, edit.hole.shape[1] // cell
    return np.asarray(~known_cells(edit.hole, cell).numpy().reshape(shape)).repeat(cell, 0).repeat(cell, 1)


def veiled(edit: Edit, cell: int) -> Picture:
    """The picture with white over what is drawn anew, and a grid of cells in it."""
    hidden = hidden_pixels(edit, cell)
    light = VEIL * edit.picture + (1 - VEIL) * np.array(WHITE)
    return np.where(hidden[..., None], light, edit.picture).round().astype(np.uint8)


def sheet(rows: Sequence[Shown], side: int = 192) -> Picture:
    """Three pictures a row, each enlarged to `side` px, the caption below."""
    cells = []
    for row in rows:
        first = draw_boxes(row.edit.picture, row.before.layout.boxes_xyxy, row.before.names, side)
        last = draw_boxes(row.picture, row.after.layout.boxes_xyxy, row.after.names, side)
        hidden = cv2.resize(veiled(row.edit, row.cell), first.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        plain = cv2.resize(row.picture, first.shape[1::-1], interpolation=cv2.INTER_CUBIC)
        cells.append(np.concatenate([first, hidden, plain, last], axis=1))
    bands = caption_bands([row.caption for row in rows], cells[0].shape[1])
    return make_grid([np.concatenate(pair) for pair in zip(cells, bands, strict=True)], 1, pad=GAP)
