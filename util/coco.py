"""COCO captions and instances of one split, filtered. What its jsons may hold: util/coco_json.py.

A split is jsons as below, or pictures with sidecars, or several of these joined (util/split_entries.py). Jsons are
<root>/annotations/instances_<split>.json, captions_<split>.json and the images in <root>/<split>/ under the
json's own file names, so 2014 (COCO_train2014_000000000009.jpg), 2017 and custom splits all work. Categories come from
the json. Boxes are kept in pixels of the source image; `fit_boxes` takes them into a crop.

Left out: segmentations, keypoints, "stuff".
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from util.boxes import Crop, areas, clip_boxes, crop_boxes, plan_center_crop, visibility, xywh_to_xyxy
from util.buckets import Size, nearest_size
from util.coco_json import BoxEntry, CaptionEntry, ImageEntry
from util.sidecars import UnknownLabels
from util.split_entries import COCO_URL, annotation_path, parts_of, read_split_entries
from util.types import UNKNOWN, Category

logger = logging.getLogger(__name__)

MIN_SIDE = 1e-6  # of the crop; shorter sides would vanish in float32


@dataclass(frozen=True)
class BoxFilters:
    """Which boxes of an image the model gets. Areas are those of the visible part, as fractions of the crop.

    min_visibility: the least share of a box's own area that must lie in the crop. max_objects: the largest are kept.
    drop_empty: also drop images that keep no box in the centre crop (otherwise they stay, with captions only).
    unknown: what becomes of a sidecar's label that is no category.
    """

    min_area: float = 0.0
    min_visibility: float = 0.2
    max_objects: int = 16
    keep_crowd: bool = False
    drop_empty: bool = False
    unknown: UnknownLabels = "refuse"

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

    captions: by caption id; may be none. phrases: what each box holds in words, "" where the json does not say; ()
    where no box has one.
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
    phrases: tuple[str, ...] = ()
    folder: str = ""


@dataclass(frozen=True)
class CocoSplit:
    """Every image that a split's json lists, sorted by id. path: of that json. removed: boxes, captions, by reason."""

    path: Path
    categories: tuple[Category, ...]
    images: tuple[CocoImage, ...]
    removed: Mapping[str, int]


def read_split(
    root: str | Path,
    split: str,
    keep_crowd: bool = False,
    captions_required: bool = True,
    unknown: UnknownLabels = "refuse",
) -> CocoSplit:
    """Reads both jsons, or sidecars, of the split or of those that it joins. Crowd boxes are removed unless kept;
    degenerate ones always are.

    captions_required: False for who needs boxes alone: without a captions file no image has a caption then. unknown:
    what becomes of a sidecar's label that is no category.
    Raises FileNotFoundError naming a missing json, ValueError naming the file and entry that are malformed.
    """
    whole = read_split_entries(Path(root), split, captions_required, unknown)
    entries = {entry.id: entry for entry in whole.images}
    removed = Counter(whole.removed)
    caption_of = _captions_by_image(whole.captions, entries, removed)
    boxes_of = _boxes_by_image(whole.boxes, entries, removed)
    position_of: dict[int | None, int] = {each.id: position for position, each in enumerate(whole.categories)}
    position_of[None] = UNKNOWN
    images = []
    for image_id in sorted(entries):
        entry, own = entries[image_id], caption_of.get(image_id, [])
        boxes_px, indices, crowd, phrases = _placed(boxes_of.get(image_id, []), entry, position_of, keep_crowd, removed)
        said = tuple(each.id for each in own), tuple(each.text for each in own)
        size, folder = (entry.width, entry.height), whole.folders[image_id]
        images.append(CocoImage(image_id, entry.file_name, *size, boxes_px, indices, *said, crowd, phrases, folder))
    return CocoSplit(whole.path, whole.categories, tuple(images), removed)


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
    def load(
        cls,
        root: str | Path,
        split: str,
        filters: BoxFilters | None = None,
        img_size: int = 256,
        sizes: Sequence[Size] = (),
    ) -> CocoIndex:
        """Reads both jsons and logs how many images, captions and boxes were left out, and why.

        Rules that depend on the crop are counted for the centre crop of `img_size`, or of the nearest of `sizes`
        (height, width); `fit_boxes` applies them, not this.
        Raises FileNotFoundError naming a missing json, ValueError naming the file and entry that are malformed.
        """
        root, filters = Path(root), filters or BoxFilters()
        whole = read_split(root, split, filters.keep_crowd, unknown=filters.unknown)
        removed = Counter(whole.removed)
        images, num_kept = [], 0
        for image in whole.images:
            size = nearest_size(image.height, image.width, sizes) if sizes else img_size
            fitted = fit_boxes(image.boxes_px, plan_center_crop(image.width, image.height, size), filters)
            if not image.captions:
                removed["images without captions"] += 1
            elif filters.drop_empty and len(fitted.kept) == 0:
                removed["images without boxes"] += 1
            else:
                removed.update({f"boxes: {rule}": count for rule, count in fitted.removed.items()})
                removed["images kept although without boxes"] += len(fitted.kept) == 0
                num_kept += len(fitted.kept)
                images.append(image)
        if not images:
            raise ValueError(f"no image of {whole.path} is left: {_counts(removed)}")
        num_removed = sum(count for reason, count in removed.items() if reason.startswith("boxes: "))
        if num_removed and num_kept == 0:
            raise ValueError(
                f"none of the {num_removed} boxes of {whole.path} is left: {_counts(removed)}; see --min_area "
                f"{filters.min_area}, --min_visibility {filters.min_visibility}, --keep_crowd {filters.keep_crowd} "
                f"and the {img_size} px centre crop"
            )
        _log_summary(whole.path, images, removed)
        return cls(root, split, filters, whole.categories, tuple(images), dict(removed))

    def __len__(self) -> int:
        return len(self.images)

    def captions(self) -> dict[int, str]:
        """All captions by their ids, in the order of images."""
        return {
            caption_id: caption
            for image in self.images
            for caption_id, caption in zip(image.caption_ids, image.captions, strict=True)
        }

    def image_path(self, position: int) -> Path:
        image = self.images[position]
        return self.root / image.folder / image.file_name

    @property
    def named_in(self) -> str:
        """What says how large its images are, for messages: jsons; those with sidecars say it themselves."""
        jsons = [annotation_path(self.root, "instances", part) for part in parts_of(self.split)]
        return " or ".join(path.name for path in jsons if path.is_file()) or "their headers"

    def require_images(self) -> None:
        """Raises FileNotFoundError unless the image folders exist and hold the first and the last image."""
        for part in parts_of(self.split):
            folder = self.root / part
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"image folder not found: {folder}. Images of {part} belong there; see {COCO_URL}"
                )
        for position in (0, len(self) - 1):
            if not self.image_path(position).is_file():
                raise FileNotFoundError(f"image not found: {self.image_path(position)}, named in {self.named_in}")


def _captions_by_image(
    captions: Sequence[CaptionEntry], entries: Mapping[int, ImageEntry], removed: Counter[str]
) -> dict[int, list[CaptionEntry]]:
    """Those that say something about listed images."""
    found: dict[int, list[CaptionEntry]] = {}
    for caption in captions:
        if caption.image_id not in entries:
            removed["captions of unlisted images"] += 1
        elif not caption.text:
            removed["empty captions"] += 1
        else:
            found.setdefault(caption.image_id, []).append(caption)
    return found


def _boxes_by_image(
    boxes: Sequence[BoxEntry], entries: Mapping[int, ImageEntry], removed: Counter[str]
) -> dict[int, list[BoxEntry]]:
    found: dict[int, list[BoxEntry]] = {}
    for box in boxes:
        if box.image_id in entries:
            found.setdefault(box.image_id, []).append(box)
        else:
            removed["boxes: unlisted image"] += 1
    return found


def _placed(
    boxes: Sequence[BoxEntry],
    image: ImageEntry,
    position_of: Mapping[int | None, int],
    keep_crowd: bool,
    removed: Counter[str],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
    """-> boxes_px [n, 4], contiguous categories [n], crowd [n], phrases; no crowds (unless kept), none degenerate."""
    kept = [box for box in boxes if keep_crowd or not box.is_crowd]
    removed["boxes: crowd"] += len(boxes) - len(kept)
    boxes_xywh = np.array([box.bbox for box in kept], dtype=np.float64).reshape(-1, 4)
    with np.errstate(over="ignore"):  # two huge numbers; the edge of the image is nearer
        boxes_px = clip_boxes(xywh_to_xyxy(boxes_xywh), image.width, image.height)
    solid = (boxes_xywh[:, 2:] > 0).all(axis=1) & (areas(boxes_px) > 0)
    removed["boxes: degenerate"] += int((~solid).sum())
    indices = np.array([position_of[box.category_id] for box in kept], dtype=np.int64)
    crowd = np.array([box.is_crowd for box in kept], dtype=bool)
    phrases = tuple(box.phrase for box, is_solid in zip(kept, solid, strict=True) if is_solid)
    return boxes_px[solid], indices[solid], crowd[solid], phrases if any(phrases) else ()


def _log_summary(path: Path, images: Sequence[CocoImage], removed: Mapping[str, int]) -> None:
    num_boxes = sum(len(image.boxes_px) for image in images)
    num_captions = sum(len(image.captions) for image in images)
    logger.info("%s: %d images, %d captions, %d boxes before the crop", path, len(images), num_captions, num_boxes)
    logger.info("%s: left out or noted (crop rules for the centre crop): %s", path, _counts(removed) or "nothing")


def _counts(removed: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(removed.items()) if count)
