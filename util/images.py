"""Pictures as uint8 [H, W, 3] RGB arrays: cropping, drawing boxes, grids, and PNG files with text.

How a file becomes a picture: util/picture_files.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import cv2
import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from util.boxes import Crop, halved_sizes, plan_center_crop
from util.output import write_atomic
from util.picture_files import load_image, picture_size

__all__ = ["load_image", "picture_size"]  # and all that is defined here

Picture: TypeAlias = np.ndarray  # uint8 [H, W, 3], RGB

BLACK = (0, 0, 0)
WHITE = (255, 255, 255)
FONT = cv2.FONT_HERSHEY_SIMPLEX
FONT_PX = 22  # height of a capital letter at font scale 1


def crop_image(image: Image.Image, crop: Crop) -> Picture:
    """Resizes and cuts as `crop` says. Raises ValueError if the image does not have the size the crop was made for."""
    if image.size != crop.source:
        raise ValueError(f"the image is {image.size} (width, height), but its crop was made for {crop.source}")
    for size in halved_sizes(*image.size, min(crop.resized)):
        image = image.resize(size, resample=Image.Resampling.BOX)
    image = image.resize(crop.resized, resample=Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    return pixels[crop.y0 : crop.y0 + crop.size, crop.x0 : crop.x0 + crop.size]


def center_crop(image: Image.Image, size: int) -> Picture:
    """ADM's centre crop (MAR's `center_crop_arr`)."""
    return crop_image(image, plan_center_crop(*image.size, size))


def to_model_range(picture: Picture) -> Tensor:
    """uint8 [H, W, 3] -> float32 [3, H, W] in [-1, 1]."""
    channels_first = np.ascontiguousarray(picture.transpose(2, 0, 1))
    return torch.from_numpy(channels_first).float() / 127.5 - 1


def to_picture(pixels: Tensor) -> Picture:
    """float [3, H, W] in [-1, 1] on any device -> uint8 [H, W, 3], rounded and clamped: `to_model_range` undone."""
    levels = ((pixels.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255)
    return np.ascontiguousarray(levels.to(torch.uint8).permute(1, 2, 0).numpy())


def draw_boxes(
    picture: Picture, boxes_xyxy: np.ndarray | Tensor, labels: Sequence[str], min_size: int = 512
) -> Picture:
    """Draws black boxes with their labels on a copy, enlarged by a whole factor until its shorter side is `min_size`.

    boxes_xyxy: [n, 4] in [0, 1]. labels: n strings. Returns uint8 [H * factor, W * factor, 3]. A thin white outline
    keeps boxes visible on dark pictures; a label goes where it covers no earlier one, if there is such a place.
    """
    boxes = np.asarray(boxes_xyxy, dtype=np.float64).reshape(-1, 4)
    if len(boxes) != len(labels):
        raise ValueError(f"{len(boxes)} boxes, but {len(labels)} labels")
    factor = max(1, math.ceil(min_size / min(picture.shape[:2])))
    interpolation = cv2.INTER_CUBIC if factor > 1 else cv2.INTER_NEAREST
    canvas = cv2.resize(picture, None, fx=factor, fy=factor, interpolation=interpolation)
    height, width = canvas.shape[:2]
    line = max(1, round(min(height, width) / 200))
    corners = [
        (int(x0), int(y0), int(x1), int(y1)) for x0, y0, x1, y1 in np.rint(boxes * [width, height, width, height])
    ]
    for color, thickness in ((WHITE, line + 2), (BLACK, line)):
        for x0, y0, x1, y1 in corners:
            cv2.rectangle(canvas, (x0, y0), (x1, y1), color, thickness, cv2.LINE_AA)
    taken: list[tuple[int, int, int, int]] = []
    for corner, label in zip(corners, labels, strict=True):
        taken.append(_draw_label(canvas, label, corner, taken))
    return canvas


def _draw_label(
    canvas: Picture, label: str, box: tuple[int, int, int, int], taken: Sequence[tuple[int, int, int, int]]
) -> tuple[int, int, int, int]:
    """White text on a black plate at the box's upper or lower edge; returns the plate's corners. Changes `canvas`."""
    height, width = canvas.shape[:2]
    scale = max(0.35, min(height, width) / 900)
    thickness = max(1, round(2 * scale))
    (text_width, text_height), baseline = cv2.getTextSize(label, FONT, scale, thickness)
    pad = max(2, round(FONT_PX * scale / 5))
    plate_width, plate_height = text_width + 2 * pad, text_height + baseline + 2 * pad
    x0, y0, x1, y1 = box
    places = [(x, y) for y in (y0 - plate_height, y0, y1 - plate_height, y1) for x in (x0, x1 - plate_width)]
    inside = [(_clamp(x, width - plate_width), _clamp(y, height - plate_height)) for x, y in places]
    plates = [(x, y, x + plate_width, y + plate_height) for x, y in inside]
    plate = next((each for each in plates if not any(_overlap(each, other) for other in taken)), plates[0])
    cv2.rectangle(canvas, plate[:2], plate[2:], BLACK, cv2.FILLED)
    origin = (plate[0] + pad, plate[1] + pad + text_height)
    cv2.putText(canvas, label, origin, FONT, scale, WHITE, thickness, cv2.LINE_AA)
    return plate


def _clamp(value: int, high: int) -> int:
    return max(0, min(value, high))


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def make_grid(pictures: Sequence[Picture], columns: int, pad: int = 4) -> Picture:
    """Pictures of one size, row by row on white, `pad` pixels apart. Raises ValueError for none or several sizes."""
    shapes = {picture.shape for picture in pictures}
    if len(shapes) != 1 or columns < 1:
        raise ValueError(
            f"a grid needs pictures of one size and columns >= 1, got sizes {sorted(shapes)}, columns={columns}"
        )
    height, width, channels = shapes.pop()
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    grid = np.full((rows * (height + pad) + pad, columns * (width + pad) + pad, channels), 255, dtype=np.uint8)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        top, left = pad + row * (height + pad), pad + column * (width + pad)
        grid[top : top + height, left : left + width] = picture
    return grid


def save_png(picture: Picture, path: str | Path, text: Mapping[str, str] | None = None) -> None:
    """Writes a PNG with `text` in its metadata (any Unicode), whole or not at all, creating the folder."""
    metadata = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        metadata.add_itxt(key, value)
    image = Image.fromarray(picture)
    write_atomic(Path(path), lambda file: image.save(file, format="PNG", pnginfo=metadata), is_durable=False)


def read_png_text(path: str | Path) -> dict[str, str]:
    """The text that `save_png` stored. Raises ValueError if the file is not a PNG."""
    with Image.open(path) as image:
        if not isinstance(image, PngImagePlugin.PngImageFile):
            raise ValueError(f"{path} is not a PNG file but {image.format}")
        return {str(key): str(value) for key, value in image.text.items()}
