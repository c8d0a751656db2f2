"""Writes tiny COCO datasets whose boxes can be found again in the pixels: coloured rectangles on grey."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

GREY = (128, 128, 128)
RED, GREEN, BLUE, YELLOW = (230, 20, 20), (20, 200, 20), (20, 20, 230), (240, 230, 20)
COLORS = {1: RED, 3: GREEN, 44: BLUE, 90: YELLOW}  # by category id
CATEGORIES = [
    {"id": 90, "name": "lemon"},
    {"id": 1, "name": "tomato"},
    {"id": 44, "name": "plum"},
    {"id": 3, "name": "leaf"},
]


@dataclass(frozen=True)
class FixtureBox:
    """A rectangle in whole pixels (so its edges are exact), filled with its category's colour unless it is a crowd."""

    category_id: int
    bbox: tuple[int, int, int, int]
    iscrowd: int = 0


@dataclass(frozen=True)
class FixtureImage:
    id: int
    width: int
    height: int
    boxes: Sequence[FixtureBox] = ()
    captions: Sequence[str] = field(default=("a tomato and a leaf", "things on a table", "two objects"))


DEFAULT_IMAGES = (
    FixtureImage(1, 97, 64, [FixtureBox(1, (20, 8, 22, 31)), FixtureBox(3, (55, 30, 24, 20))]),
    FixtureImage(2, 50, 77, [FixtureBox(44, (6, 20, 30, 25))], captions=("one plum", "fruit")),
    FixtureImage(5, 333, 257, [FixtureBox(90, (60, 40, 101, 83)), FixtureBox(1, (180, 150, 90, 60))]),
    FixtureImage(9, 64, 64, [], captions=("nothing at all",)),
    FixtureImage(12, 72, 60, [FixtureBox(3, (30, 12, 30, 30))], captions=("a leaf on the left", "the RIGHT-hand leaf")),
)


def file_name(split: str, image_id: int) -> str:
    """COCO's own: 2014 names carry the split, 2017 names do not."""
    return f"COCO_{split}_{image_id:012d}.jpg" if split.endswith("2014") else f"{image_id:012d}.jpg"


def paint(image: FixtureImage) -> np.ndarray:
    pixels = np.full((image.height, image.width, 3), GREY, dtype=np.uint8)
    for box in image.boxes:
        x, y, width, height = box.bbox
        if not box.iscrowd:
            pixels[max(y, 0) : max(y + height, 0), max(x, 0) : max(x + width, 0)] = COLORS[box.category_id]
    return pixels


def write_coco(root: Path, split: str = "train2017", images: Sequence[FixtureImage] = DEFAULT_IMAGES) -> Path:
    """Writes annotations and images; returns `root`. Caption ids are 100 * image id + position."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir(parents=True, exist_ok=True)
    for image in images:
        Image.fromarray(paint(image)).save(root / split / file_name(split, image.id), quality=98, subsampling=0)
    entries = [
        {"id": each.id, "file_name": file_name(split, each.id), "width": each.width, "height": each.height}
        for each in images
    ]
    boxes = [
        {
            "id": 1000 * image.id + position,
            "image_id": image.id,
            "category_id": box.category_id,
            "bbox": list(box.bbox),
            "area": box.bbox[2] * box.bbox[3],
            "iscrowd": box.iscrowd,
        }
        for image in images
        for position, box in enumerate(image.boxes)
    ]
    captions = [
        {"id": 100 * image.id + position, "image_id": image.id, "caption": caption}
        for image in images
        for position, caption in enumerate(image.captions)
    ]
    instances = {"images": entries, "annotations": boxes, "categories": CATEGORIES}
    annotation_path(root, "instances", split).write_text(json.dumps(instances))
    annotation_path(root, "captions", split).write_text(json.dumps({"images": entries, "annotations": captions}))
    return root


def annotation_path(root: Path, kind: str, split: str = "train2017") -> Path:
    return root / "annotations" / f"{kind}_{split}.json"


def find_color(pixels: np.ndarray, color: tuple[int, int, int]) -> tuple[int, int, int, int] | None:
    """uint8 [H, W, 3] -> xyxy pixel edges of what is nearer to `color` than to every other colour of the fixture."""
    palette = np.array([color, GREY, *(each for each in COLORS.values() if each != color)], dtype=np.float64)
    distances = np.linalg.norm(pixels[:, :, None].astype(np.float64) - palette, axis=-1)
    rows, columns = np.nonzero(distances.argmin(axis=-1) == 0)
    if len(rows) == 0:
        return None
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
