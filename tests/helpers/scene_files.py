"""A split's jsons for scenes."""

from __future__ import annotations

import json
from pathlib import Path

from util.types import Category

CATEGORIES = [Category(1, "person"), Category(18, "dog"), Category(37, "sports ball")]


def write_coco(root: Path) -> None:
    """Three images of 200x100: one with a dog, one without boxes, one whose boxes are a person and a ball."""
    (root / "annotations").mkdir(parents=True)
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 200, "height": 100} for i in (1, 2, 3)]
    boxes = [(1, 18, [50, 0, 50, 100]), (3, 1, [100, 50, 50, 50]), (3, 37, [60, 10, 80, 80])]
    annotations = [
        {"id": i, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for i, (image, category, box) in enumerate(boxes)
    ]
    captions = [{"id": 10 * i + k, "image_id": i, "caption": f"caption {k} of {i}"} for i in (1, 2, 3) for k in (0, 1)]
    names = [{"id": category.id, "name": category.name} for category in CATEGORIES]
    instances = {"images": images, "annotations": annotations, "categories": names}
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(instances))
    (root / "annotations" / "captions_val2017.json").write_text(json.dumps({"images": images, "annotations": captions}))
