"""A picture of a rollout: every sample with the boxes that were wanted and those the reward's detector found.

Groups are rows, under their caption; samples are columns, each with its reward below. Wanted boxes are thick and blue,
with their label above; detected ones thin and orange, with label and score below, unsure ones pale and unlabelled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from engine.data.scenes import Scene
from engine.sample.grid import GRID_CELL, GRID_GAP, caption_bands, caption_font_size
from models.frozen.detections import Detections
from util.images import WHITE, Picture, make_grid
from util.labels import Corners, place_labels
from util.types import Category

WANTED = (20, 90, 220)
DETECTED = (235, 110, 0)
UNSURE = (250, 190, 130)
SURE_SCORE = 0.3  # from here on a detection gets its label: more labels than that cover the picture

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Labelled = tuple[Corners[int], str]


def rollout_grid(
    images: Sequence[Picture],
    scenes: Sequence[Scene],
    detections: Sequence[Detections],
    rewards: Sequence[float],
    categories: Sequence[Category],
    min_score: float,
    group_size: int,
) -> Picture:
    """images: n uint8 [H, W, 3], group by group, `group_size` samples each; scenes, detections and rewards: one each.

    detections: boxes in px of the image, the dataset's category ids (`categories`); scores below `min_score` are not
    drawn. Images are enlarged by a whole factor to cells at least `GRID_CELL` px wide.
    Raises ValueError if the numbers disagree, a group mixes captions, or a category id is unknown.
    """
    _check(images, scenes, detections, rewards, group_size)
    names = {category.id: category.name for category in categories}
    scale = math.ceil(GRID_CELL / images[0].shape[1])
    width = images[0].shape[1] * scale
    pictures = [
        draw_sample(image, scene, found, names, min_score, scale)
        for image, scene, found in zip(images, scenes, detections, strict=True)
    ]
    bands = caption_bands([f"reward {reward:.3f}" for reward in rewards], width)
    cells = [np.concatenate(cell) for cell in zip(pictures, bands, strict=True)]
    starts = range(0, len(cells), group_size)
    rows = [make_grid(cells[start : start + group_size], group_size, pad=GRID_GAP) for start in starts]
    parts = [_legend(rows[0].shape[1], width)]
    for start, row in zip(starts, rows, strict=True):
        (caption,) = caption_bands([scenes[start].prompt], row.shape[1] - 2 * GRID_GAP, caption_font_size(width) + 2)
        parts += [np.pad(caption, ((GRID_GAP, 0), (GRID_GAP, GRID_GAP), (0, 0)), constant_values=255), row]
    return np.concatenate(parts)


def draw_sample(
    image: Picture, scene: Scene, found: Detections, names: Mapping[int, str], min_score: float, scale: int
) -> Picture:
    """One image, enlarged `scale` times, with its wanted and detected boxes. Raises ValueError on an unknown id."""
    interpolation = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_NEAREST
    canvas = Image.fromarray(cv2.resize(image, None, fx=scale, fy=scale, interpolation=interpolation))
    height, width = image.shape[:2]
    line = max(1, round(scale * min(height, width) / 128))
    wanted = _corners(scene.layout.boxes_xyxy * torch.tensor([width, height, width, height]), canvas, scale)
    kept = found.scores >= min_score
    detected = _corners(found.boxes_px[kept], canvas, scale)
    scores = found.scores[kept].tolist()
    kinds = [_name(names, category) for category in found.category_ids[kept].tolist()]

    draw = ImageDraw.Draw(canvas)
    for corners in wanted:
        draw.rectangle(corners, outline=WANTED, width=2 * line)
    for corners, score in sorted(zip(detected, scores, strict=True), key=lambda pair: pair[1]):  # the best on top
        draw.rectangle(corners, outline=DETECTED if score >= SURE_SCORE else UNSURE, width=line)
    font = ImageFont.load_default(max(10, canvas.width // 24))
    sure = [
        (box, f"{kind} {score:.2f}")
        for box, kind, score in zip(detected, kinds, scores, strict=True)
        if score >= SURE_SCORE
    ]
    _draw_labels(draw, [*zip(wanted, scene.names, strict=True)], sure, font)
    return np.asarray(canvas)


def _corners(boxes_px: Tensor, canvas: Image.Image, scale: int) -> list[Corners[int]]:
    """Boxes of the image as corners on its enlargement, within it and at least a pixel wide."""
    corners = []
    for x0, y0, x1, y1 in (boxes_px.float().cpu() * scale).round().int().tolist():
        left, top = min(max(x0, 0), canvas.width - 2), min(max(y0, 0), canvas.height - 2)
        right, bottom = min(x1, canvas.width - 1), min(y1, canvas.height - 1)
        corners.append((left, top, max(right, left + 1), max(bottom, top + 1)))
    return corners


def _draw_labels(
    draw: ImageDraw.ImageDraw, wanted: Sequence[Labelled], detected: Sequence[Labelled], font: Font
) -> None:
    """White texts on plates; wanted boxes' begin their search at the upper edge, detected ones' at the lower one."""
    both = [*wanted, *detected]
    insides = [tuple(math.ceil(side) for side in font.getbbox(label)) for _, label in both]  # left, top, right, bottom
    sizes = [(right - left + 4, bottom - top + 4) for left, top, right, bottom in insides]
    is_detected = [index >= len(wanted) for index in range(len(both))]
    outer = [(x0, y0, x1 + 1, y1 + 1) for (x0, y0, x1, y1), _ in both]
    plates = place_labels(outer, sizes, draw.im.size, is_detected)
    for (x0, y0, x1, y1), (left, top, *_), (_, label), below in zip(plates, insides, both, is_detected, strict=True):
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=DETECTED if below else WANTED)
        draw.text((x0 + 2 - left, y0 + 2 - top), label, fill=WHITE, font=font)


def _legend(width: int, cell_width: int) -> Picture:
    """What the colours mean, as wide as the grid."""
    size = caption_font_size(cell_width)
    font = ImageFont.load_default(size)
    band = Image.new("RGB", (width, 2 * size), WHITE)
    draw = ImageDraw.Draw(band)
    x, middle = float(GRID_GAP), band.height // 2
    for color, text in ((WANTED, "wanted"), (DETECTED, "detected"), (UNSURE, f"score below {SURE_SCORE}")):
        side = band.height // 4
        draw.rectangle((x, middle - side, x + 2 * side, middle + side), fill=color)
        draw.text((x + 3 * side, middle), text, fill="black", font=font, anchor="lm")
        x += 6 * side + font.getlength(text)
    return np.asarray(band)


def _name(names: Mapping[int, str], category_id: int) -> str:
    if category_id not in names:
        raise ValueError(f"a detection has category id {category_id}, the dataset's are {sorted(names)}")
    return names[category_id]


def _check(
    images: Sequence[Picture],
    scenes: Sequence[Scene],
    detections: Sequence[Detections],
    rewards: Sequence[float],
    group_size: int,
) -> None:
    sizes = {len(images), len(scenes), len(detections), len(rewards)}
    if len(sizes) != 1 or not images:
        raise ValueError(
            "a rollout grid needs a scene, detections and a reward for each image and at least one image, got "
            f"{len(images)} images, {len(scenes)} scenes, {len(detections)} detections, {len(rewards)} rewards"
        )
    if group_size < 1 or len(images) % group_size:
        raise ValueError(f"{len(images)} images do not split into groups of {group_size}")
    for start in range(0, len(images), group_size):
        prompts = {scene.prompt for scene in scenes[start : start + group_size]}
        if len(prompts) > 1:
            raise ValueError(f"the group from image {start} on mixes captions: {sorted(prompts)}")
