"""Pictures for people to look at: side by side, enlarged, boxes and labels drawn on them, captions under them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from engine.data.scenes import Scene
from util.images import Picture, draw_boxes, make_grid

GRID_CELL = 256  # pixels: the width below which the grid enlarges images by default
GRID_GAP = 10


def scene_grid(
    images: Sequence[Picture], scenes: Sequence[Scene], columns: int | None = None, scale: int | None = None
) -> Picture:
    """The images side by side, enlarged `scale` times, boxes and labels drawn on them, the caption under each.

    Images of several sizes stand on white cells as high and wide as the largest. columns: default: as square as
    possible, at most 8. scale: default: cells at least `GRID_CELL` pixels wide.
    """
    if not images or len(images) != len(scenes):
        raise ValueError(f"a grid needs one scene per image and at least one, got {len(images)} and {len(scenes)}")
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    scale = scale or math.ceil(GRID_CELL / width)
    columns = columns or min(8, math.ceil(math.sqrt(len(images))))
    boxed = []
    for image, scene in zip(images, scenes, strict=True):
        min_size = scale * min(image.shape[:2])  # draw_boxes then enlarges exactly `scale` times
        boxed.append(draw_boxes(image, scene.layout.boxes_xyxy, scene.names, min_size))
    boxed = [on_white(image, scale * height, scale * width) for image in boxed]
    bands = caption_bands([scene.prompt for scene in scenes], width * scale)
    cells = [np.concatenate(cell) for cell in zip(boxed, bands, strict=True)]
    return make_grid(cells, columns, pad=GRID_GAP)


def on_white(picture: Picture, height: int, width: int) -> Picture:
    """The picture in the middle of a white one of this size."""
    own_height, own_width = picture.shape[:2]
    canvas = np.full((height, width, 3), 255, dtype=np.uint8)
    top, left = (height - own_height) // 2, (width - own_width) // 2
    canvas[top : top + own_height, left : left + own_width] = picture
    return canvas


def caption_bands(captions: Sequence[str], width: int, font_size: int | None = None) -> list[Picture]:
    """Every caption in black on white, wrapped to `width` pixels; all bands have the height of the longest.

    font_size: in px; default: what suits an image that is `width` wide.
    """
    font = ImageFont.load_default(font_size or caption_font_size(width))
    wrapped = [_wrap(caption, font, width) for caption in captions]
    ascent_to_descent = font.getbbox("Ágjy")
    line_height = math.ceil(1.15 * (ascent_to_descent[3] - min(0, ascent_to_descent[1])))
    height = line_height * max(len(lines) for lines in wrapped) + 4
    bands = []
    for lines in wrapped:
        band = Image.new("RGB", (width, height), "white")
        draw = ImageDraw.Draw(band)
        for number, line in enumerate(lines):
            draw.text((1, 2 + number * line_height), line, fill="black", font=font)
        bands.append(np.asarray(band))
    return bands


def caption_font_size(width: int) -> int:
    """Pixels, for the caption of an image `width` wide."""
    return max(11, width // 19)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, max_lines: int = 4) -> list[str]:
    """The text in lines of at most `width` pixels; what does not fit in `max_lines` ends in an ellipsis."""
    lines = [""]
    for word in text[: max_lines * width].split():  # a letter is a pixel wide or more
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        for letter in f"\n{word}":  # words too long for a line are cut
            if letter == "\n" or font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter.strip()
    lines = lines if lines[0] else lines[1:] or [""]
    if len(lines) <= max_lines:
        return lines
    last = lines[max_lines - 1]
    while last and font.getlength(last + "...") > width:
        last = last[:-1]
    return [*lines[: max_lines - 1], last + "..."]
