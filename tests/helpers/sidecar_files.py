"""The pictures of `coco_fixture` with their boxes and captions in files beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from tests.helpers.coco_fixture import CATEGORIES, DEFAULT_IMAGES, FixtureImage, paint

NAMES = {category["id"]: str(category["name"]) for category in CATEGORIES}


def write_sidecars(root: Path, split: str = "mine", images: Sequence[FixtureImage] = DEFAULT_IMAGES) -> Path:
    """Writes <id>.png, .bbox and .txt into the split's folder, which is returned."""
    folder = root / split
    folder.mkdir(parents=True, exist_ok=True)
    for image in images:
        Image.fromarray(paint(image)).save(folder / f"{image.id}.png")
        lines = []
        for box in image.boxes:
            x, y, width, height = box.bbox
            corners = [x / image.width, y / image.height, (x + width) / image.width, (y + height) / image.height]
            lines.append(json.dumps({"label": NAMES[box.category_id], "bbox": corners}))
        (folder / f"{image.id}.bbox").write_text("\n".join(lines))
        (folder / f"{image.id}.txt").write_text("\n".join(image.captions) + "\n")
    return folder


def write_categories(root: Path) -> None:
    """What says which labels are categories, where no json does."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "annotations" / "categories.json").write_text(json.dumps({"categories": CATEGORIES}))
