"""Pictures as uint8 [H, W, 3] RGB arrays: cropping, drawing boxes, grids, and PNG files with text.

How a file becomes a picture: util/picture_files.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TypeAlias

import cv2
import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor
from torch.nn.functional import interpolate

from util.boxes import Crop, halved_sizes, plan_center_crop
from util.labels import Corners, place_labels
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
    height, width = crop.size
    return pixels[crop.y0 : crop.y0 + height, crop.x0 : crop.x0 + width]


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


def shrink(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, 3, H, W] -> [B, 3, h, w] of the same range: means over areas, as `crop_image` halves."""
    return interpolate(pixels, size=size, mode="area")


def shrunk_psnr(large: Tensor, small: Tensor) -> Tensor:
    """How near large pictures are to small ones once they are shrunk: PSNR in dB, at most 100, [B]. large: [B, 3, H, W]
    in [-1, 1]; small: [B, 3, h, w]."""
    error = (shrink(large, (small.shape[-2], small.shape[-1])) - small).square().mean((1, 2, 3))
    return (4 / error.clamp(min=4e-10)).log10() * 10


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
    style = _label_style(min(height, width))
    plates = place_labels(corners, [_plate_size(label, *style) for label in labels], (width, height))
    for plate, label in zip(plates, labels, strict=True):
        _draw_label(canvas, label, plate, *style)
    return canvas


def _label_style(side: int) -> tuple[float, int, int]:
    """OpenCV's font scale and line thickness, and the room around a text in px, for a picture of this side."""
    scale = max(0.35, side / 900)
    return scale, max(1, round(2 * scale)), max(2, round(FONT_PX * scale / 5))


def _plate_size(label: str, scale: float, thickness: int, pad: int) -> tuple[int, int]:
    (width, height), baseline = cv2.getTextSize(label, FONT, scale, thickness)
    return width + 2 * pad, height + baseline + 2 * pad


def _draw_label(canvas: Picture, label: str, plate: Corners[int], scale: float, thickness: int, pad: int) -> None:
    """White text on a black plate. Changes `canvas`."""
    cv2.rectangle(canvas, plate[:2], plate[2:], BLACK, cv2.FILLED)
    text_height = cv2.getTextSize(label, FONT, scale, thickness)[0][1]
    cv2.putText(
        canvas, label, (plate[0] + pad, plate[1] + pad + text_height), FONT, scale, WHITE, thickness, cv2.LINE_AA
    )


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


def encode_png(picture: Picture, text: Mapping[str, str] | None = None) -> bytes:
    """The content of a PNG with `text` in its metadata (any Unicode). picture: a fourth channel is transparency."""
    metadata = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        metadata.add_itxt(key, value)
    file = BytesIO()
    Image.fromarray(picture).save(file, format="PNG", pnginfo=metadata)
    return file.getvalue()


def save_png(picture: Picture, path: str | Path, text: Mapping[str, str] | None = None) -> None:
    """Writes `encode_png`, whole or not at all, creating the folder."""
    write_atomic(Path(path), lambda file: file.write(encode_png(picture, text)), is_durable=False)


def read_png_text(path: str | Path) -> dict[str, str]:
    """The text that `save_png` stored. Raises ValueError if the file is not a PNG."""
    with Image.open(path) as image:
        if not isinstance(image, PngImagePlugin.PngImageFile):
            raise ValueError(f"{path} is not a PNG file but {image.format}")
        return {str(key): str(value) for key, value in image.text.items()}
