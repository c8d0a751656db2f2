"""Which part of a picture is drawn anew: holes in pixels, and the cells that a hole touches.

A cell is the square of pixels that is hidden and drawn as one token. Boxes make holes of whole cells: all that they
touch. What a box holds may reach a little beyond it, and so does what a token says, so that one cell more on all sides
is hidden with every hole.

Shape letters: H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from util.images import Picture

MASK_LEVEL = 128  # a mask's pixels from this grey level on are the hole
SLACK = 1e-4  # of a cell: a box that ends on a border, up to rounding, does not touch the cell behind it

Box = Sequence[float]
"""x0, y0, x1, y1 as shares of the picture."""


def hole_of_boxes(boxes: Iterable[Box], size: tuple[int, int]) -> np.ndarray:
    """The pixels inside boxes: bool [H, W]. size: (H, W). Raises ValueError naming a box without a pixel."""
    height, width = size
    inside = np.zeros(size, dtype=bool)
    for x0, y0, x1, y1 in boxes:
        left, top, right, bottom = (round(end) for end in (x0 * width, y0 * height, x1 * width, y1 * height))
        if not (left < right and top < bottom):
            raise ValueError(f"box {x0:g} {y0:g} {x1:g} {y1:g} has no pixel in an image of {width}x{height} px")
        inside[top:bottom, left:right] = True
    return inside


def hole_of_cells(boxes: Iterable[Box], size: tuple[int, int], cell: int) -> np.ndarray:
    """The cells of `cell` x `cell` px that boxes touch: bool [H, W] in pixels. size: (H, W), whole cells. Raises
    ValueError naming a box without an inside."""
    rows, columns = size[0] // cell, size[1] // cell
    inside = np.zeros((rows, columns), dtype=bool)
    for x0, y0, x1, y1 in boxes:
        if not (x0 < x1 and y0 < y1):
            raise ValueError(f"box {x0:g} {y0:g} {x1:g} {y1:g} has no inside")
        (left, right), (top, bottom) = _touched(x0, x1, columns), _touched(y0, y1, rows)
        inside[top:bottom, left:right] = True
    return inside.repeat(cell, axis=0).repeat(cell, axis=1)


def _touched(low: float, high: float, count: int) -> tuple[int, int]:
    """The first cell of `count` that an interval of shares touches, and the one behind the last."""
    first = min(int(np.floor(low * count + SLACK)), count - 1)
    return first, max(first + 1, int(np.ceil(high * count - SLACK)))


def hole_of_mask(mask: Picture) -> np.ndarray:
    """bool [H, W]: the light pixels of a picture [H, W, 3]."""
    return mask.mean(axis=2) >= MASK_LEVEL


def known_cells(hole: np.ndarray, cell: int) -> Tensor:
    """Which cells of `cell` x `cell` px the hole does not touch when it is grown by one cell: [rows * columns] bool."""
    rows, columns = hole.shape[0] // cell, hole.shape[1] // cell
    touched = torch.from_numpy(hole).view(rows, cell, columns, cell).any(3).any(1)  # [rows, columns]
    grown = torch.nn.functional.max_pool2d(touched[None].float(), 3, stride=1, padding=1)[0] > 0  # [rows, columns]
    return ~grown.flatten()


def drawn_share(hole: np.ndarray, feather: int) -> np.ndarray:
    """How much of each pixel is what was drawn, float32 [H, W]: 1 in the hole, and 0 where it is more than `feather`
    pixels away (the larger of the two distances, across and down), falling evenly in between."""
    if feather == 0:
        return hole.astype(np.float32)
    distance = cv2.distanceTransform((~hole).astype(np.uint8), cv2.DIST_C, 3)  # [H, W], 0 in the hole
    return np.clip(1 - distance / (feather + 1), 0, 1).astype(np.float32)
