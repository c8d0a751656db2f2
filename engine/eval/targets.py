"""The images, layouts and ground truth of one evaluation, as its profile says.

Boxes and pixels go through the same `Crop`, so a box rewritten at output size lies on the object in the picture.
There are two ground truths, both at output size. "full" holds every visible box. "conditioned" asks only for the boxes
that the model was given; every other visible box is an ignore region there (iscrowd 1), because an object that the
filters removed but the model drew anyway is no mistake. `area` is width * height of the visible box, not the
mask's: masks are not carried through the geometry, so small, medium and large differ slightly from COCO's own.

Left out: masks, "stuff".
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from engine.data.phrases import own_phrases
from engine.data.scenes import Scene
from engine.eval.names import BoxesBy
from engine.eval.profiles import GEOMETRIES, Profile
from util.boxes import Crop, areas, clip_boxes, crop_boxes, plan_center_crop, plan_squash, xyxy_to_xywh
from util.coco import CocoImage, filter_boxes, is_visible, read_split
from util.images import Picture, crop_image, load_image
from util.picture_files import require_size
from util.split_entries import parts_of
from util.types import UNKNOWN, Category, Layout

logger = logging.getLogger(__name__)

GroundTruthKind = Literal["full", "conditioned"]
PERSON = "person"


@dataclass(frozen=True)
class Target:
    """One image of the evaluation. Sizes are (width, height), of the photo and of the picture made from it.

    scene: its first caption (lowest id; "" if it has none) and the boxes given to the model, largest first.
    boxes_px: [n, 4] float64 xyxy in pixels of the picture, every visible box, crowds too, largest first.
    category_ids: [n] int64, the dataset's. conditioned: [n] bool, given to the model: boxes_px[conditioned] are the
    scene's, in its order. crowd: [n] bool.
    """

    image_id: int
    file_name: str
    source_size: tuple[int, int]
    size: tuple[int, int]
    scene: Scene
    boxes_px: np.ndarray
    category_ids: np.ndarray
    conditioned: np.ndarray
    crowd: np.ndarray


@dataclass(frozen=True)
class EvalSet:
    """The targets of a profile on a split, sorted by image id. categories: the dataset's, all of them.

    removed: images and boxes left out, per rule. The boxes are those of the images that are used, except for
    degenerate, unlisted and skipped ones, which are counted over the whole split. file_names: of every image of the
    split, by id.
    """

    profile: Profile
    root: Path
    split: str
    categories: tuple[Category, ...]
    targets: tuple[Target, ...]
    removed: Mapping[str, int]
    file_names: Mapping[int, str]

    @property
    def ids_hash(self) -> str:
        """12 hex digits of sha256 over the sorted image ids, one a line: equal hashes, equal images."""
        lines = "\n".join(str(image_id) for image_id in sorted(target.image_id for target in self.targets))
        return hashlib.sha256(lines.encode()).hexdigest()[:12]

    def ground_truth(self, kind: GroundTruthKind) -> dict[str, Any]:
        """A COCO instances json at output size; see the head of this file for the two kinds. Plain values only."""
        if kind not in ("full", "conditioned"):
            raise ValueError(f"kind must be 'full' or 'conditioned', got {kind!r}")
        images = [
            {"id": each.image_id, "file_name": each.file_name, "width": each.size[0], "height": each.size[1]}
            for each in self.targets
        ]
        annotations: list[dict[str, Any]] = []
        for target in self.targets:
            ignored = target.crowd if kind == "full" else ~target.conditioned
            annotations.extend(_annotations(target, ignored, first_id=len(annotations) + 1))
        return {
            "info": {"profile": self.profile.name, "hash": self.profile.hash, "kind": kind, "split": self.split},
            "images": images,
            "categories": [{"id": each.id, "name": each.name} for each in self.categories],
            "annotations": annotations,
        }

    def picture(self, target: Target) -> Picture:
        """The real photo through the profile's geometry.

        Raises FileNotFoundError or ValueError naming the file if it is missing, unreadable or of another size than
        the annotations say.
        """
        path = self.root / self.split / target.file_name
        image = load_image(path)
        require_size(path, image, target.source_size, f"instances_{self.split}.json")
        return apply_geometry(image, self.profile.geometry, self.profile.resolution)


def plan_geometry(width: int, height: int, geometry: str, resolution: int | None) -> Crop | None:
    """The way from a width x height photo to the picture; None where it stays as it is ("original")."""
    if geometry not in GEOMETRIES:
        raise ValueError(f"geometry must be one of {', '.join(GEOMETRIES)}, got {geometry!r}")
    if (geometry == "original") != (resolution is None):
        raise ValueError(f"geometry {geometry!r} does not go with resolution {resolution!r}")
    if resolution is None:
        return None
    plan = plan_center_crop if geometry == "center_crop" else plan_squash
    return plan(width, height, resolution)


def apply_geometry(image: Image.Image, geometry: str, resolution: int | None) -> Picture:
    """RGB image -> uint8 [resolution, resolution, 3], or [H, W, 3] for "original"."""
    crop = plan_geometry(*image.size, geometry, resolution)
    return np.asarray(image) if crop is None else crop_image(image, crop)


def load_eval_set(
    root: str | Path,
    profile: Profile,
    split: str | None = None,
    skip_categories: frozenset[str] = frozenset(),
    max_images: int | None = None,
    captions_required: bool = True,
    boxes_by: BoxesBy = "class",
) -> EvalSet:
    """The targets of `profile` on the split (default: the profile's own). Needs the jsons, not the photos.

    skip_categories: names whose boxes vanish first of all, before any rule counts them. max_images: only the first
    ids of what the profile selects. Images without captions stay, with an empty prompt, and are counted in `removed`
    under "images used without captions"; with captions_required=False so do all of a split without a captions file.
    boxes_by: what the model is told of a box: its class, its phrase (its class's name where it has none), or both.
    Boxes of sidecars whose labels are no categories are left out and counted: no detector knows them.
    Raises ValueError for unknown names and where no image is left, and whatever `read_split` raises.
    """
    if max_images is not None and max_images < 1:
        raise ValueError(f"max_images must be at least 1, got {max_images}")
    root, split = Path(root), split or profile.split
    if len(parts_of(split)) > 1:
        raise ValueError(f"an evaluation is of one split, got {split!r}")
    whole = read_split(root, split, True, captions_required, unknown="leave_out")
    unknown = sorted(skip_categories - {category.name for category in whole.categories})
    if unknown:
        raise ValueError(f"{whole.path} has no categories {', '.join(unknown)}, which were to be skipped")
    if profile.max_persons is not None and PERSON not in {category.name for category in whole.categories}:
        logger.warning("%s has no category %r: max_persons=%d removes nothing", whole.path, PERSON, profile.max_persons)
    removed = Counter(whole.removed)
    skipped = np.array([category.name in skip_categories for category in whole.categories], dtype=bool)
    limit = min((each for each in (profile.num_images, max_images) if each is not None), default=len(whole.images))
    targets: list[Target] = []
    for image in whole.images:
        selection = _select(_without(image, skipped, removed), whole.categories, profile)
        if selection.refused_by is not None:
            removed[f"images: {selection.refused_by}"] += 1
        elif len(targets) >= limit:
            removed["images: beyond the first"] += 1
        else:
            removed.update(selection.removed)
            targets.append(_target(selection, whole.categories, boxes_by))
    if not targets:
        raise ValueError(f"profile {profile.name} leaves no image of {whole.path}: {_summary(removed)}")
    file_names = {image.id: image.file_name for image in whole.images}
    logger.info("%s, profile %s (%s): %d images", whole.path, profile.name, profile.hash, len(targets))
    logger.info("%s: left out or noted: %s", whole.path, _summary(removed))
    if max_images is not None and max_images > len(targets):
        logger.warning("%s: %d images were asked for, there are %d", whole.path, max_images, len(targets))
    return EvalSet(profile, root, split, whole.categories, tuple(targets), dict(removed), file_names)


@dataclass(frozen=True)
class _Selection:
    """What the rules say about one image. unclipped: [n, 4] in [0, 1] of the picture. kept: [k] positions in it."""

    image: CocoImage
    size: tuple[int, int]
    unclipped: np.ndarray
    kept: np.ndarray
    refused_by: str | None
    removed: Mapping[str, int]


def _select(image: CocoImage, categories: tuple[Category, ...], profile: Profile) -> _Selection:
    crop = plan_geometry(image.width, image.height, profile.geometry, profile.resolution)
    if crop is None:
        size = (image.width, image.height)
        unclipped = image.boxes_px / np.array([*size, *size])
    else:
        size = (crop.size[1], crop.size[0])
        unclipped = crop_boxes(image.boxes_px, crop)
    candidates = np.arange(len(unclipped)) if profile.keep_crowd else np.nonzero(~image.crowd)[0]
    fitted = filter_boxes(unclipped[candidates], profile.filters)
    removed = Counter({f"boxes: {rule}": count for rule, count in fitted.removed.items()})
    removed["boxes: crowd"] = len(unclipped) - len(candidates)
    removed["images used without captions"] = not image.captions
    num_persons = sum(categories[position].name == PERSON for position in image.categories[candidates])
    num_boxes = len(fitted.kept) + fitted.removed["max_objects"]
    refused_by = None
    if profile.max_persons is not None and num_persons > profile.max_persons:
        refused_by = "max_persons"
    elif num_boxes < profile.min_boxes:
        refused_by = "min_boxes"
    elif profile.max_boxes is not None and num_boxes > profile.max_boxes:
        refused_by = "max_boxes"
    return _Selection(image, size, unclipped, candidates[fitted.kept], refused_by, removed)


def _target(selection: _Selection, categories: tuple[Category, ...], boxes_by: BoxesBy) -> Target:
    image, kept = selection.image, selection.kept
    clipped = clip_boxes(selection.unclipped)
    largest_first = np.argsort(-areas(clipped), kind="stable")
    shown = largest_first[is_visible(clipped)[largest_first]]
    layout = Layout(torch.from_numpy(clipped[kept]).float(), torch.from_numpy(image.categories[kept]))
    names = [categories[position].name for position in image.categories[kept]]
    if boxes_by != "class":
        phrases = own_phrases(image, categories)
        layout = replace(layout, phrases=tuple(phrases[place] for place in kept))
    if boxes_by == "phrase":
        layout = replace(layout, categories=torch.full_like(layout.categories, UNKNOWN))
        names = list(layout.phrases)
    ids = np.array([categories[position].id for position in image.categories[shown]], dtype=np.int64)
    return Target(
        image.id,
        image.file_name,
        (image.width, image.height),
        selection.size,
        Scene(image.captions[0] if image.captions else "", layout, names),
        clipped[shown] * np.array([*selection.size, *selection.size], dtype=np.float64),
        ids,
        np.isin(shown, kept),
        image.crowd[shown],
    )


def _without(image: CocoImage, skipped: np.ndarray, removed: Counter[str]) -> CocoImage:
    """The image without the boxes of skipped categories ([number of categories] bool), which are counted."""
    stays = ~skipped[image.categories]
    if stays.all():
        return image
    removed["boxes: skipped category"] += int((~stays).sum())
    phrases = tuple(phrase for phrase, is_kept in zip(image.phrases, stays, strict=False) if is_kept)
    boxes, categories, crowd = image.boxes_px[stays], image.categories[stays], image.crowd[stays]
    return replace(image, boxes_px=boxes, categories=categories, crowd=crowd, phrases=phrases if any(phrases) else ())


def _annotations(target: Target, ignored: np.ndarray, first_id: int) -> list[dict[str, Any]]:
    """Ids start at 1: pycocotools takes a match with annotation 0 for none."""
    boxes_xywh = xyxy_to_xywh(target.boxes_px)
    return [
        {
            "id": first_id + position,
            "image_id": target.image_id,
            "category_id": int(category_id),
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": int(is_ignored),
            "ignore": int(is_ignored),
        }
        for position, (box, category_id, is_ignored) in enumerate(
            zip(boxes_xywh.tolist(), target.category_ids, ignored, strict=True)
        )
    ]


def _summary(removed: Mapping[str, int]) -> str:
    return ", ".join(f"{rule} {count}" for rule, count in sorted(removed.items()) if count) or "nothing"
