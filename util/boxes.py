"""Box geometry: pure functions on [..., 4] floating-point arrays, numpy or torch alike, and the crop of an image.

Formats carry their names: `boxes_xywh` (COCO's: corner, width, height), `boxes_px` (xyxy in pixels of the source),
`boxes_xyxy` (xyxy in [0, 1] of the picture the model sees). x points right, y down; edges, not pixel centres, so the
whole image is (0, 0, width, height).

The crops are ADM's (openai/guided-diffusion, image_datasets.py), which MAR uses: halve with a box filter, resize with a
bicubic one, cut a square. For other shapes the image is resized until it covers them. `Crop` holds the affine map of
one such crop, so boxes follow pixels exactly. `plan_squash` alone does not keep proportions: layout benchmarks resize
whole images to a square.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np
import torch

from util.buckets import Size

Array = TypeVar("Array", np.ndarray, torch.Tensor)
CropMode = Literal["center", "random"]
CROP_MODES: tuple[CropMode, ...] = get_args(CropMode)

ADM_MIN_CROP_FRACTION = 0.8

_SAME = [0, 1, 2, 3]
_MIRRORED = [2, 1, 0, 3]
_X = [0, 2]
_Y = [1, 3]


def xywh_to_xyxy(boxes_xywh: Array) -> Array:
    """[..., 4] corner, width, height -> [..., 4] two corners."""
    boxes = boxes_xywh[..., _SAME]
    boxes[..., 2:] = boxes[..., :2] + boxes[..., 2:]
    return boxes


def xyxy_to_xywh(boxes_xyxy: Array) -> Array:
    """[..., 4] two corners -> [..., 4] corner, width, height."""
    boxes = boxes_xyxy[..., _SAME]
    boxes[..., 2:] = boxes[..., 2:] - boxes[..., :2]
    return boxes


def areas(boxes_xyxy: Array) -> Array:
    """[..., 4] -> [...], in squared units of the boxes; 0 for boxes without an inside."""
    sides = (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).clip(0)
    return sides[..., 0] * sides[..., 1]


def flip_boxes(boxes_xyxy: Array, width: float = 1.0) -> Array:
    """[..., 4] -> [..., 4], mirrored left to right in a picture of the given width; still x0 <= x1."""
    boxes = boxes_xyxy[..., _MIRRORED]
    boxes[..., _X] = width - boxes[..., _X]
    return boxes


def clip_boxes(boxes_xyxy: Array, width: float = 1.0, height: float = 1.0) -> Array:
    """[..., 4] -> [..., 4], cut off at the edges of a picture of the given size; may leave boxes without an inside."""
    boxes = boxes_xyxy[..., _SAME]
    boxes[..., _X] = boxes[..., _X].clip(0, width)
    boxes[..., _Y] = boxes[..., _Y].clip(0, height)
    return boxes


def visibility(boxes_xyxy: Array, width: float = 1.0, height: float = 1.0) -> Array:
    """[..., 4] boxes that may reach out of the picture -> [...], the share of each one's area inside; 0 if none."""
    whole = areas(boxes_xyxy)
    visible = areas(clip_boxes(boxes_xyxy, width, height))
    return visible / whole.clip(1e-12)


@dataclass(frozen=True)
class Crop:
    """An image of `source` (width, height) resized to `resized` (width, height), of which `size` (height, width) at
    (x0, y0) is kept."""

    source: tuple[int, int]
    resized: tuple[int, int]
    x0: int
    y0: int
    size: Size

    def __post_init__(self) -> None:
        width, height = self.resized
        if not (0 <= self.x0 <= width - self.size[1] and 0 <= self.y0 <= height - self.size[0]):
            raise ValueError(
                f"a {self.size[1]}x{self.size[0]} crop at ({self.x0}, {self.y0}) reaches out of an image of "
                f"{width}x{height}"
            )

    @property
    def scale(self) -> tuple[float, float]:
        """Pixels of the crop per pixel of the source, in x and y (for ADM's crops they differ by rounding only)."""
        return self.resized[0] / self.source[0], self.resized[1] / self.source[1]


def crop_boxes(boxes_px: Array, crop: Crop) -> Array:
    """[..., 4] pixels of the source -> [..., 4] in units of the crop, where [0, 1] is visible; not clipped."""
    boxes = boxes_px[..., _SAME]
    boxes[..., _X] = (boxes[..., _X] * crop.scale[0] - crop.x0) / crop.size[1]
    boxes[..., _Y] = (boxes[..., _Y] * crop.scale[1] - crop.y0) / crop.size[0]
    return boxes


def uncrop_boxes(boxes_xyxy: Array, crop: Crop) -> Array:
    """The inverse of `crop_boxes`: units of the crop -> pixels of the source."""
    boxes = boxes_xyxy[..., _SAME]
    boxes[..., _X] = (boxes[..., _X] * crop.size[1] + crop.x0) / crop.scale[0]
    boxes[..., _Y] = (boxes[..., _Y] * crop.size[0] + crop.y0) / crop.scale[1]
    return boxes


def halved_sizes(width: int, height: int, side: int) -> list[tuple[int, int]]:
    """The sizes an image passes through while its shorter side is at least twice `side`; empty if it never is."""
    sizes = []
    while min(width, height) >= 2 * side:
        width, height = width // 2, height // 2
        sizes.append((width, height))
    return sizes


def resized_to(width: int, height: int, side: int) -> tuple[int, int]:
    """The size at which the shorter side is `side` after halving, rounded as ADM rounds."""
    width, height = ([(width, height), *halved_sizes(width, height, side)])[-1]
    scale = side / min(width, height)
    return round(width * scale), round(height * scale)


def covering_side(width: int, height: int, size: Size) -> int:
    """The least shorter side at which a width x height image covers `size`; of a square, that square's side."""
    side = max(1, round(min(width, height) * max(size[1] / width, size[0] / height)))
    while True:
        resized = resized_to(width, height, side)
        if resized[0] >= size[1] and resized[1] >= size[0]:
            return side
        side += 1  # halving drops odd pixels


def plan_center_crop(width: int, height: int, size: int | Size) -> Crop:
    """ADM's centre crop of a width x height image: `size` (height, width), or so many pixels square."""
    size = as_size(size)
    resized = resized_to(width, height, covering_side(width, height, size))
    return Crop((width, height), resized, (resized[0] - size[1]) // 2, (resized[1] - size[0]) // 2, size)


def plan_squash(width: int, height: int, size: int) -> Crop:
    """The whole width x height image pressed into a `size` square: nothing is cut off, proportions are lost."""
    return Crop((width, height), (size, size), 0, 0, (size, size))


def plan_random_crop(
    width: int, height: int, size: int | Size, generator: torch.Generator, min_fraction: float = ADM_MIN_CROP_FRACTION
) -> Crop:
    """ADM's random crop: the image covers `size` (height, width; or a square) up to `1 / min_fraction` times; then any
    position."""
    size = as_size(size)
    least = covering_side(width, height, size)
    side = _draw(least, math.ceil(least / min_fraction), generator)
    resized = resized_to(width, height, side)
    y0 = _draw(0, resized[1] - size[0], generator)
    x0 = _draw(0, resized[0] - size[1], generator)
    return Crop((width, height), resized, x0, y0, size)


def as_size(size: int | Size) -> Size:
    """(height, width) of a square's side, or of what is a size already."""
    return (size, size) if isinstance(size, int) else size


def _draw(low: int, high: int, generator: torch.Generator) -> int:
    """A whole number in [low, high], both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))
