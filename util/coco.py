"""COCO captions and instances of one split, read through pycocotools, validated and filtered.

Expects <root>/annotations/instances_<split>.json, captions_<split>.json and the images in <root>/<split>/ under the
json's own file names, so 2014 (COCO_train2014_000000000009.jpg), 2017 and custom splits all work. Categories come from
the json. Boxes are kept in pixels of the source image; `fit_boxes` takes them into a crop.

Left out: segmentations, keypoints, "stuff".
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from util.boxes import Crop, areas, clip_boxes, crop_boxes, plan_center_crop, visibility, xywh_to_xyxy
from util.types import Category

logger = logging.getLogger(__name__)

MIN_SIDE = 1e-6  # of the crop; shorter sides would vanish in float32
COCO_URL = "https://cocodataset.org/#download"


@dataclass(frozen=True)
class BoxFilters:
    """Which boxes of an image the model gets. Areas are those of the visible part, as fractions of the crop.

    min_visibility: the least share of a box's own area that must lie in the crop. max_objects: the largest are kept.
    drop_empty: also drop images that keep no box in the centre crop (otherwise they stay, with captions only).
    """

    min_area: float = 0.0
    min_visibility: float = 0.2
    max_objects: int = 16
    keep_crowd: bool = False
    drop_empty: bool = False

    def __post_init__(self) -> None:
        for name in ("min_area", "min_visibility"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a fraction and must lie in [0, 1], got {getattr(self, name)}")
        if self.max_objects < 1:
            raise ValueError(f"max_objects must be at least 1, got {self.max_objects}")


@dataclass(frozen=True)
class FittedBoxes:
    """What is left of an image's boxes in a crop: largest first.

    boxes_xyxy: [n, 4] float64 in [0, 1], clipped. kept: [n] positions in the boxes given. removed: boxes per rule.
    """

    boxes_xyxy: np.ndarray
    kept: np.ndarray
    removed: Mapping[str, int]


def fit_boxes(boxes_px: np.ndarray, crop: Crop, filters: BoxFilters) -> FittedBoxes:
    """boxes_px: [n, 4] in pixels of the source. Each box counts for the first rule that removes it."""
    return filter_boxes(crop_boxes(boxes_px, crop), filters)


def is_visible(boxes_xyxy: np.ndarray) -> np.ndarray:
    """[n, 4] clipped to [0, 1] -> [n] bool: whether something of the box is left."""
    return (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2] > MIN_SIDE).all(axis=1)


def filter_boxes(unclipped: np.ndarray, filters: BoxFilters) -> FittedBoxes:
    """unclipped: [n, 4] xyxy where [0, 1] is visible, as `crop_boxes` gives them."""
    clipped = clip_boxes(unclipped)
    visible_areas = areas(clipped)
    rules = {
        "out_of_crop": is_visible(clipped),
        "min_visibility": visibility(unclipped) >= filters.min_visibility,
        "min_area": visible_areas >= filters.min_area,
    }
    alive = np.ones(len(unclipped), dtype=bool)
    removed = {}
    for name, passes in rules.items():
        removed[name] = int((alive & ~passes).sum())
        alive &= passes
    largest_first = np.argsort(-visible_areas, kind="stable")
    kept = largest_first[alive[largest_first]]
    removed["max_objects"] = max(0, len(kept) - filters.max_objects)
    kept = kept[: filters.max_objects]
    return FittedBoxes(clipped[kept], kept, removed)


@dataclass(frozen=True, slots=True)
class CocoImage:
    """One image. boxes_px: [n, 4] float64 xyxy, inside it. categories: [n] int64, contiguous. crowd: [n] bool.

    captions: by caption id; may be none.
    """

    id: int
    file_name: str
    width: int
    height: int
    boxes_px: np.ndarray
    categories: np.ndarray
    caption_ids: tuple[int, ...]
    captions: tuple[str, ...]
    crowd: np.ndarray


@dataclass(frozen=True)
class CocoSplit:
    """Every image that a split's json lists, sorted by id. path: of that json. removed: boxes, captions, by reason."""

    path: Path
    categories: tuple[Category, ...]
    images: tuple[CocoImage, ...]
    removed: Mapping[str, int]


def read_split(root: str | Path, split: str, keep_crowd: bool = False, captions_required: bool = True) -> CocoSplit:
    """Reads both jsons. Crowd boxes are removed unless kept; degenerate ones always are.

    captions_required: False for who needs boxes alone: without a captions file no image has a caption then.
    Raises FileNotFoundError naming a missing json, ValueError naming the file and entry that are malformed.
    """
    instances_path = _annotation_file(Path(root), "instances", split)
    captions_path = _annotation_path(Path(root), "captions", split)
    if captions_required:
        _annotation_file(Path(root), "captions", split)
    instances = _read(instances_path, ("images", "annotations", "categories"), ("bbox", "category_id"))
    categories = _categories(instances.dataset["categories"], instances_path)
    removed: Counter[str] = Counter()
    caption_of = {}
    if captions_path.is_file():
        captions = _read(captions_path, ("annotations",), ("caption",))
        caption_of = _captions(captions, captions_path, set(instances.imgs), removed)
    boxes_of = _boxes(instances, instances_path, categories, keep_crowd, removed)
    images = []
    for image_id in sorted(instances.imgs):
        entry = instances.imgs[image_id]
        size = _image_size(entry, instances_path)
        boxes_px, indices, crowd = boxes_of.get(image_id, _NO_BOXES)
        ids = tuple(caption_id for caption_id, _ in caption_of.get(image_id, ()))
        texts = tuple(text for _, text in caption_of.get(image_id, ()))
        images.append(CocoImage(image_id, entry["file_name"], *size, boxes_px, indices, ids, texts, crowd))
    return CocoSplit(instances_path, categories, tuple(images), removed)


@dataclass(frozen=True)
class CocoIndex:
    """The images of a split, sorted by id, each with at least one caption. removed: what was left out, by reason."""

    root: Path
    split: str
    filters: BoxFilters
    categories: tuple[Category, ...]
    images: tuple[CocoImage, ...]
    removed: Mapping[str, int]

    @classmethod
    def load(cls, root: str | Path, split: str, filters: BoxFilters | None = None, img_size: int = 256) -> CocoIndex:
        """Reads both jsons and logs how many images, captions and boxes were left out, and why.

        Rules that depend on the crop are counted for the centre crop of `img_size`; `fit_boxes` applies them, not this.
        Raises FileNotFoundError naming a missing json, ValueError naming the file and entry that are malformed.
        """
        root, filters = Path(root), filters or BoxFilters()
        whole = read_split(root, split, filters.keep_crowd)
        removed = Counter(whole.removed)
        images = []
        for image in whole.images:
            fitted = fit_boxes(image.boxes_px, plan_center_crop(image.width, image.height, img_size), filters)
            if not image.captions:
                removed["images without captions"] += 1
            elif filters.drop_empty and len(fitted.kept) == 0:
                removed["images without boxes"] += 1
            else:
                removed.update({f"boxes: {rule}": count for rule, count in fitted.removed.items()})
                removed["images kept although without boxes"] += len(fitted.kept) == 0
                images.append(image)
        if not images:
            raise ValueError(f"no image of {whole.path} is left: {dict(removed)}")
        _log_summary(whole.path, images, removed)
        return cls(root, split, filters, whole.categories, tuple(images), dict(removed))

    def __len__(self) -> int:
        return len(self.images)

    def image_path(self, position: int) -> Path:
        return self.root / self.split / self.images[position].file_name

    def require_images(self) -> None:
        """Raises FileNotFoundError unless the image folder exists and holds the first and the last image."""
        folder = self.root / self.split
        if not folder.is_dir():
            raise FileNotFoundError(
                f"image folder not found: {folder}. Images of {self.split} belong there; see {COCO_URL}"
            )
        for position in (0, len(self) - 1):
            if not self.image_path(position).is_file():
                raise FileNotFoundError(
                    f"image not found: {self.image_path(position)}, named in instances_{self.split}.json"
                )


_NO_BOXES = (np.zeros((0, 4)), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool))


def _annotation_path(root: Path, kind: str, split: str) -> Path:
    return root / "annotations" / f"{kind}_{split}.json"


def _annotation_file(root: Path, kind: str, split: str) -> Path:
    path = _annotation_path(root, kind, split)
    if not path.is_file():
        found = sorted(each.name for each in path.parent.glob("*.json")) if path.parent.is_dir() else []
        raise FileNotFoundError(
            f"COCO annotations not found: {path}. In {path.parent}: {', '.join(found) or 'no json files'}. "
            f"See {COCO_URL}"
        )
    return path


def _read(path: Path, fields: Sequence[str], annotation_fields: Sequence[str]) -> COCO:
    """A pycocotools index of the file, after a check of what pycocotools takes for granted."""
    try:
        dataset = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid json: {error}") from error
    if not isinstance(dataset, dict):
        raise ValueError(f"{path} must hold a json object with {list(fields)}, got a {type(dataset).__name__}")
    for field in fields:
        if not isinstance(dataset.get(field), list):
            raise ValueError(f"{path} has no list {field!r}; it holds {sorted(dataset)}")
        _require(dataset[field], ("id",), f"{path}: {field}")
    _require(dataset["annotations"], ("image_id", *annotation_fields), f"{path}: annotations")
    for field in fields:
        _unique([entry["id"] for entry in dataset[field]], f"{path}: {field}")
    index = COCO()
    index.dataset = dataset
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        index.createIndex()
    logger.debug("pycocotools on %s: %s", path, " ".join(said.getvalue().split()))
    return index


def _require(entries: Sequence[Any], fields: Sequence[str], where: str) -> None:
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict) or any(field not in entry for field in fields):
            raise ValueError(f"{where}[{position}] must have {list(fields)}, got {str(entry)[:200]}")


def _unique(ids: Sequence[int], where: str) -> None:
    if len(set(ids)) != len(ids):
        twice = next(each for each, count in Counter(ids).items() if count > 1)
        raise ValueError(f"{where}: id {twice} occurs more than once")


def _categories(entries: Sequence[dict[str, Any]], path: Path) -> tuple[Category, ...]:
    _require(entries, ("id", "name"), f"{path}: categories")
    return tuple(sorted((Category(entry["id"], entry["name"]) for entry in entries), key=lambda each: each.id))


def _image_size(entry: dict[str, Any], path: Path) -> tuple[int, int]:
    _require([entry], ("file_name", "width", "height"), f"{path}: images, id {entry['id']}")
    if entry["width"] < 1 or entry["height"] < 1:
        raise ValueError(f"{path}: image {entry['id']} has size {entry['width']}x{entry['height']}")
    return entry["width"], entry["height"]


def _captions(index: COCO, path: Path, image_ids: set[int], removed: Counter[str]) -> dict[int, list[tuple[int, str]]]:
    """Image id -> its captions as (id, text with single spaces), sorted by id."""
    captions: dict[int, list[tuple[int, str]]] = {}
    for entry in sorted(index.dataset["annotations"], key=lambda each: each["id"]):
        if not isinstance(entry["caption"], str):
            raise ValueError(f"{path}: caption {entry['id']} must be a string, got {entry['caption']!r}")
        text = " ".join(entry["caption"].split())
        if entry["image_id"] not in image_ids:
            removed["captions of unlisted images"] += 1
        elif not text:
            removed["empty captions"] += 1
        else:
            captions.setdefault(entry["image_id"], []).append((entry["id"], text))
    return captions


def _boxes(
    index: COCO, path: Path, categories: Sequence[Category], keep_crowd: bool, removed: Counter[str]
) -> dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Image id -> boxes_px [n, 4], contiguous categories [n], crowd [n]; no crowds (unless kept), none degenerate."""
    position_of = {category.id: position for position, category in enumerate(categories)}
    collected = {}
    for image_id, entries in index.imgToAnns.items():
        if image_id not in index.imgs:
            removed["boxes: unlisted image"] += len(entries)
            continue
        for entry in entries:
            _check_annotation(entry, position_of, path)
        kept = [entry for entry in entries if keep_crowd or not entry.get("iscrowd", 0)]
        removed["boxes: crowd"] += len(entries) - len(kept)
        if not kept:
            continue
        boxes_xywh = np.array([entry["bbox"] for entry in kept], dtype=np.float64)
        size = _image_size(index.imgs[image_id], path)
        boxes_px = clip_boxes(xywh_to_xyxy(boxes_xywh), *size)
        solid = (boxes_xywh[:, 2:] > 0).all(axis=1) & (areas(boxes_px) > 0)
        removed["boxes: degenerate"] += int((~solid).sum())
        indices = np.array([position_of[entry["category_id"]] for entry in kept], dtype=np.int64)
        crowd = np.array([bool(entry.get("iscrowd", 0)) for entry in kept])
        collected[image_id] = (boxes_px[solid], indices[solid], crowd[solid])
    return collected


def _check_annotation(entry: dict[str, Any], position_of: Mapping[int, int], path: Path) -> None:
    if entry["category_id"] not in position_of:
        raise ValueError(
            f"{path}: annotation {entry['id']} has category_id {entry['category_id']}, "
            f"which is none of the {len(position_of)} ids in 'categories'"
        )
    box = entry["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(value, (int, float)) for value in box):
        raise ValueError(f"{path}: annotation {entry['id']} must have a bbox [x, y, width, height], got {box!r}")


def _log_summary(path: Path, images: Sequence[CocoImage], removed: Mapping[str, int]) -> None:
    num_boxes = sum(len(image.boxes_px) for image in images)
    num_captions = sum(len(image.captions) for image in images)
    counts = ", ".join(f"{reason} {count}" for reason, count in sorted(removed.items()) if count)
    logger.info("%s: %d images, %d captions, %d boxes before the crop", path, len(images), num_captions, num_boxes)
    logger.info("%s: left out or noted (crop rules for the centre crop): %s", path, counts or "nothing")
