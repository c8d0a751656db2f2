"""The two files beside a picture: its boxes in a .bbox file, its captions in a .txt file.

A .bbox file has one JSON object a line, or one list of them:

    {"label": "dog", "bbox": [0.1, 0.2, 0.5, 0.8]}

bbox is xyxy in [0, 1] of the upright picture; "phrase" may say in words what the box holds. A .txt file has one caption
a line.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from util.box_readings import XYXY, read_box
from util.read import read_text, short_repr

SIDECAR_SUFFIX, CAPTION_SUFFIX = ".bbox", ".txt"
BOX_KEYS = ("label", "bbox", "phrase", "scale", "edit")
_ARTICLE = re.compile(r"(a|an|the)\s+", re.IGNORECASE)


def category_name(label: Any, names: Collection[str]) -> Any:
    """The category that a label means: "A teddy bear" is "teddy bear"; else the label itself."""
    if not isinstance(label, str) or label in names:
        return label
    bare = _ARTICLE.sub("", label.strip().lower(), count=1)
    return bare if bare in names else label


def read_boxes(lines: Sequence[Any], where: str, names: Collection[str]) -> list[dict[str, Any]]:
    """The objects of a .bbox file, with the keys that are read. Raises ValueError that begins with `where`."""
    objects = []
    for index, line in enumerate(lines):
        own = f"{where}, object {index}"
        if not isinstance(line, dict) or "label" not in line or "bbox" not in line:
            raise ValueError(f"{own}: must be an object with the keys 'label' and 'bbox', got {short_repr(line)}")
        label = category_name(line["label"], names)
        box = read_box(line["bbox"], f"{own} ({short_repr(label)})", "bbox", XYXY, ("a .bbox file", ""))
        objects.append({key: line[key] for key in BOX_KEYS if key in line} | {"label": label, "bbox": box})
    return objects


def read_captions(path: str | Path) -> list[str]:
    """The captions of a .txt file, with single spaces; blank lines are none."""
    lines = (" ".join(line.split()) for line in read_text(path, "caption file").splitlines())
    return [line for line in lines if line]
