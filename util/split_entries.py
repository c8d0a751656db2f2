"""What a split lists, before any of it is placed or left out: images, captions, boxes, categories.

A split is jsons as COCO has them, or a folder of pictures with sidecars (`sidecars.py`), or several of these joined by
"+" ("train2017+my_photos"). Categories of sidecars are those of the jsons beside them, or else those that
<root>/annotations/categories.json lists, in an instances json's field "categories".
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from util.coco_json import BoxEntry, CaptionEntry, ImageEntry, read_captions, read_categories, read_instances
from util.read import short_path
from util.sidecar_files import SIDECAR_SUFFIX
from util.sidecars import UnknownLabels, has_sidecars, read_sidecars
from util.types import Category

COCO_URL = "https://cocodataset.org/#download"
JOIN = "+"


@dataclass(frozen=True)
class SplitEntries:
    """path: of what lists the images. folders: those of the images, below the root, by id. removed: by sidecars."""

    path: Path
    images: list[ImageEntry]
    boxes: list[BoxEntry]
    captions: list[CaptionEntry]
    categories: tuple[Category, ...]
    folders: Mapping[int, str]
    removed: Counter[str]


def parts_of(split: str) -> list[str]:
    """The splits that a name joins. Raises ValueError for a blank one and for one that is there twice."""
    parts = split.split(JOIN)
    if not all(part.strip() for part in parts) or len(set(parts)) < len(parts):
        raise ValueError(f"a split joins different names by {JOIN!r}, got {split!r}")
    return parts


def read_split_entries(root: Path, split: str, captions_required: bool, unknown: UnknownLabels) -> SplitEntries:
    """captions_required: of jsons. unknown: what becomes of sidecars' labels that are no categories.

    Raises FileNotFoundError naming a missing json, ValueError naming the file and entry that are wrong.
    """
    parts = parts_of(split)
    beside = [part for part in parts if not _has_json(root, part) and has_sidecars(root / part)]
    listed = [_read_jsons(root, part, captions_required) for part in parts if part not in beside]
    if beside:
        categories = listed[0].categories if listed else _own_categories(root, root / beside[0])
        listed += [_read_sidecars(root, part, categories, unknown) for part in beside]
    return listed[0] if len(listed) == 1 else _joined(root / split, listed)


def _joined(path: Path, listed: Sequence[SplitEntries]) -> SplitEntries:
    folder_of: dict[int, str] = {}
    caption_ids: dict[int, Path] = {}
    for part in listed:
        if part.categories != listed[0].categories:
            raise ValueError(f"{short_path(part.path)} has other categories than {short_path(listed[0].path)}: "
                             "splits that are joined have the same")  # fmt: skip
        for image in part.images:
            if image.id in folder_of:
                raise ValueError(f"image {image.id} is in {folder_of[image.id]} and in {part.folders[image.id]}")
            folder_of[image.id] = part.folders[image.id]
        for caption in part.captions:
            if caption_ids.setdefault(caption.id, part.path) is not part.path:
                raise ValueError(f"caption {caption.id} is in {caption_ids[caption.id]} and in {part.path}")
    listing = {image.id for part in listed for image in part.images}
    return SplitEntries(
        path,
        [image for part in listed for image in part.images],
        [box for part in listed for box in part.boxes if box.image_id in listing],
        sorted((each for part in listed for each in part.captions), key=lambda each: each.id),
        listed[0].categories,
        folder_of,
        sum((part.removed for part in listed), Counter()),
    )


def _read_jsons(root: Path, part: str, captions_required: bool) -> SplitEntries:
    path = annotation_file(root, "instances", part)
    captions_path = annotation_path(root, "captions", part)
    if captions_required:
        annotation_file(root, "captions", part)
    instances = read_instances(path)
    captions = read_captions(captions_path) if os.path.isfile(captions_path) else []
    folders = {image.id: part for image in instances.images}
    return SplitEntries(path, instances.images, instances.boxes, captions, instances.categories, folders, Counter())


def _read_sidecars(root: Path, part: str, categories: tuple[Category, ...], unknown: UnknownLabels) -> SplitEntries:
    found = read_sidecars(root, part, categories, unknown)
    images, boxes = found.instances.images, found.instances.boxes
    removed = Counter({"boxes: label of no category": found.num_left_out})
    return SplitEntries(
        root / part, images, boxes, found.captions, categories, {each.id: part for each in images}, removed
    )


def _own_categories(root: Path, folder: Path) -> tuple[Category, ...]:
    path = root / "annotations" / "categories.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{short_path(folder)} has sidecars, and {short_path(path)} is to say which labels are categories: "
            '{"categories": [{"id": 1, "name": "dog"}, ...]}, as in an instances json'
        )
    return read_categories(path)


def _has_json(root: Path, part: str) -> bool:
    return annotation_path(root, "instances", part).is_file()


def annotation_path(root: Path, kind: str, split: str) -> Path:
    return root / "annotations" / f"{kind}_{split}.json"


def annotation_file(root: Path, kind: str, split: str) -> Path:
    """Raises FileNotFoundError that lists the jsons that there are."""
    path = annotation_path(root, kind, split)
    if not os.path.isfile(path):
        found = sorted(each.name for each in path.parent.glob("*.json")) if path.parent.is_dir() else []
        raise FileNotFoundError(
            f"COCO annotations not found: {path}. In {path.parent}: {', '.join(found) or 'no json files'}; nor does "
            f"{short_path(root / split)} hold {SIDECAR_SUFFIX} files. See {COCO_URL}"
        )
    return path
