"""COCO average precision of a set of detections, and the same number on resampled images.

pycocotools matches and averages; we add what a comparison needs: only the images asked for, custom area classes,
empty lists, and bootstrap resamples without matching again. The average precision of one class at one IoU threshold is

    AP = 1/101 * sum_{r in 0, .01, ..., 1} max_{recall(d) >= r} precision(d),   precision = TP / (TP + FP)

over the detections d, best score first. Drawing image i w_i times multiplies its counts by w_i and nothing else, so
a resample is a weighted cumulative sum over detections sorted once. This equals pycocotools on literally repeated
images, except that equal scores of one class within one image are walked through box by box, not copy by copy.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
RESAMPLED = {"AP": slice(None), "AP50": slice(0, 1), "AP75": slice(5, 6)}  # of the IoU thresholds .5, .55, ..., .95
AREAS = ("all", "small", "medium", "large")
MAX_AREA = 1e10
RECALLS = np.linspace(0.0, 1.0, 101)
COLUMNS = 25  # resamples at a time: about 20 MB for 100,000 detections of one class

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassMatches:
    """What became of one class's detections, best score first, over all areas. D detections, T IoU thresholds.

    images: [D] position in `image_ids`. hits: [T, D] bool, true positives. ignored: [T, D] bool, neither right nor
    wrong (matched to a crowd). num_objects: [num_images], objects to be found.
    """

    images: np.ndarray
    hits: np.ndarray
    ignored: np.ndarray
    num_objects: np.ndarray

    def precision(self, weights: np.ndarray) -> np.ndarray:
        """Interpolated AP [T, R] for multiplicities [R, num_images]; NaN where a resample holds no such object."""
        num_objects = weights @ self.num_objects
        parts = [
            self._precision(weights[start : start + COLUMNS], num_objects[start : start + COLUMNS])
            for start in range(0, len(weights), COLUMNS)
        ]
        return np.concatenate([np.empty((len(self.hits), 0)), *parts], axis=1)

    def _precision(self, weights: np.ndarray, num_objects: np.ndarray) -> np.ndarray:
        # Precision can only rise at a hit, so its running maximum from the right is needed at hits alone.
        found = np.flatnonzero(self.hits.any(axis=0))
        num_walked = found[-1] + 1 if len(found) else 0
        copies = weights.T[self.images[:num_walked]]  # [D, R]
        walked = np.cumsum(copies, axis=0)
        result = np.zeros((len(self.hits), len(weights)))
        for threshold, (hits, ignored) in enumerate(zip(self.hits, self.ignored, strict=True)):
            at = np.flatnonzero(hits)
            if len(at) == 0:
                continue
            skipped = np.flatnonzero(ignored[:num_walked])
            num_skipped = np.concatenate([np.zeros_like(copies[:1]), np.cumsum(copies[skipped], axis=0)])
            counted = walked[at] - num_skipped[np.searchsorted(skipped, at)]  # TP + FP so far
            true = np.cumsum(copies[at], axis=0)
            best = np.maximum.accumulate((true / (counted + np.spacing(1)))[::-1], axis=0)[::-1]
            reached = np.searchsorted(RECALLS, true / np.maximum(num_objects, 1), side="right")
            newly_reached = np.diff(reached, axis=0, prepend=0)
            result[threshold] = (best * newly_reached).sum(axis=0) / len(RECALLS)
        return np.where(num_objects > 0, result, np.nan)


@dataclass(frozen=True)
class ApResult:
    """AP of one set of detections.

    values: METRICS -> number in [0, 1], NaN where there is no such object. per_class: category id -> {"AP", "AP50"}.
    """

    values: Mapping[str, float]
    per_class: Mapping[int, Mapping[str, float]]
    num_images: int
    matches: tuple[ClassMatches, ...] = field(repr=False)

    def resample(self, weights: np.ndarray) -> Mapping[str, np.ndarray]:
        """AP, AP50 and AP75, each [R], when image i (in the order of `image_ids`) counts weights[r, i] times.

        A class counts in a resample that holds one of its objects. weights: [R, num_images] whole numbers >= 0.
        """
        weights = np.asarray(weights)
        if weights.ndim != 2 or weights.shape[1] != self.num_images or weights.dtype.kind not in "iu":
            raise ValueError(
                f"weights must be whole numbers [R, {self.num_images}], got {weights.dtype} {weights.shape}"
            )
        if weights.size and weights.min() < 0:
            raise ValueError(f"weights are multiplicities of images, got {weights.min()}")
        weights = weights.astype(np.int64)
        curves = np.stack([each.precision(weights) for each in self.matches]) if self.matches else None  # [K, T, R]
        if curves is None:
            return {name: np.full(len(weights), np.nan) for name in RESAMPLED}
        return {name: _mean_of_defined(curves[:, part]) for name, part in RESAMPLED.items()}


def average_precision(
    ground_truth: Mapping[str, Any],
    detections: Sequence[Mapping[str, Any]],
    image_ids: Sequence[int],
    max_detections: int = 100,
    area_edges_px: tuple[float, float] = (32.0, 96.0),
) -> ApResult:
    """Scores detections on the images `image_ids` of a COCO instances dict; objects of other images do not count.

    detections: {image_id, category_id, bbox xywh, score}. max_detections: best of each image and class; AR100 is the
    recall within them. area_edges_px: sides in pixels; an object is small up to e0^2, medium up to e1^2 (an object
    on an edge is in both classes, as in pycocotools). Only `iscrowd` makes a box an ignore region.
    Neither input is changed. Raises ValueError for ids that the ground truth lacks and for detections elsewhere.
    """
    image_ids = [int(image_id) for image_id in image_ids]
    _check_ground_truth(ground_truth, image_ids)
    check_detections(detections, image_ids, [category["id"] for category in ground_truth["categories"]])
    if max_detections < 1:
        raise ValueError(f"max_detections must be at least 1, got {max_detections}")
    if not 0 < area_edges_px[0] < area_edges_px[1]:
        raise ValueError(f"area_edges_px must rise from above 0, got {area_edges_px}")
    evaluation = _evaluate(ground_truth, detections, image_ids, max_detections, area_edges_px)
    precision = evaluation.eval["precision"][..., 0]  # [T, recalls, K, areas], -1 where undefined
    recall = evaluation.eval["recall"][..., 0]  # [T, K, areas]
    values = {name: _mean(precision[part, :, :, 0]) for name, part in RESAMPLED.items()}
    values |= {f"AP{AREAS[area][0]}": _mean(precision[..., area]) for area in (1, 2, 3)}
    values["AR100"] = _mean(recall[..., 0])
    per_class = {
        int(category_id): {"AP": _mean(precision[:, :, k, 0]), "AP50": _mean(precision[0, :, k, 0])}
        for k, category_id in enumerate(evaluation.params.catIds)
    }
    return ApResult(values, per_class, len(image_ids), _class_matches(evaluation, image_ids))


def check_detections(
    detections: Sequence[Mapping[str, Any]], image_ids: Sequence[int], category_ids: Sequence[int] | None = None
) -> None:
    """Raises ValueError for an image or category that is not listed, a box that is not finite xywh, a score of NaN."""
    images, categories = set(image_ids), None if category_ids is None else set(category_ids)
    for position, detection in enumerate(detections):
        where = f"detection {position} of image {detection['image_id']}"
        if detection["image_id"] not in images:
            raise ValueError(f"{where}: this image is not among the {len(images)} that are scored")
        if categories is not None and detection["category_id"] not in categories:
            raise ValueError(f"{where}: category_id {detection['category_id']} is not in the ground truth")
        box = detection["bbox"]
        if len(box) != 4 or not all(math.isfinite(number) for number in box) or box[2] < 0 or box[3] < 0:
            raise ValueError(f"{where}: bbox must be finite x, y, width >= 0, height >= 0, got {list(box)}")
        if not math.isfinite(detection["score"]):
            raise ValueError(f"{where}: score must be finite, got {detection['score']}")


def _check_ground_truth(ground_truth: Mapping[str, Any], image_ids: Sequence[int]) -> None:
    if not image_ids:  # pycocotools would take an empty list for "all"
        raise ValueError("image_ids is empty: there is nothing to score")
    if len(set(image_ids)) < len(image_ids):
        raise ValueError(f"image_ids must be unique, got {len(image_ids)} ids, {len(set(image_ids))} different")
    if not ground_truth["categories"]:
        raise ValueError("ground_truth has no categories")
    missing = sorted(set(image_ids) - {image["id"] for image in ground_truth["images"]})
    if missing:
        raise ValueError(f"{len(missing)} of {len(image_ids)} image_ids are not in the ground truth: {missing[:10]}")


def _evaluate(
    ground_truth: Mapping[str, Any],
    detections: Sequence[Mapping[str, Any]],
    image_ids: Sequence[int],
    max_detections: int,
    area_edges_px: tuple[float, float],
) -> COCOeval:
    # Fresh ids from 1: pycocotools takes a match to annotation 0 for no match. Copies: it writes into annotations.
    wanted = set(image_ids)
    annotations = [each for each in ground_truth["annotations"] if each["image_id"] in wanted]
    objects = [{**each, "iscrowd": int(each.get("iscrowd", 0)), "id": i} for i, each in enumerate(annotations, 1)]
    results = [
        {**each, "id": i, "iscrowd": 0, "area": each["bbox"][2] * each["bbox"][3]}
        for i, each in enumerate(detections, 1)
    ]
    small, large = (edge**2 for edge in area_edges_px)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        evaluation = COCOeval(_index(ground_truth, objects), _index(ground_truth, results), "bbox")
        evaluation.params.imgIds = sorted(image_ids)
        evaluation.params.maxDets = [max_detections]
        evaluation.params.areaRng = [[0, MAX_AREA], [0, small], [small, large], [large, MAX_AREA]]
        evaluation.params.areaRngLbl = list(AREAS)
        evaluation.evaluate()
        evaluation.accumulate()
    logger.debug("pycocotools: %s", " ".join(said.getvalue().split()))
    return evaluation


def _index(ground_truth: Mapping[str, Any], annotations: list[dict[str, Any]]) -> COCO:
    index = COCO()
    index.dataset = {
        "images": list(ground_truth["images"]),
        "categories": list(ground_truth["categories"]),
        "annotations": annotations,
    }
    index.createIndex()
    return index


def _class_matches(evaluation: COCOeval, image_ids: Sequence[int]) -> tuple[ClassMatches, ...]:
    """The matches of every class that has an object, over all areas. evalImgs is flat: class, area, image."""
    params = evaluation.params
    num_images, num_areas = len(params.imgIds), len(params.areaRng)
    position = {image_id: i for i, image_id in enumerate(image_ids)}
    found = []
    for k in range(len(params.catIds)):
        start = k * num_areas * num_images
        entries = [entry for entry in evaluation.evalImgs[start : start + num_images] if entry is not None]
        num_objects = np.zeros(num_images, dtype=np.int64)
        for entry in entries:
            num_objects[position[entry["image_id"]]] = np.count_nonzero(np.asarray(entry["gtIgnore"]) == 0)
        if not num_objects.any():
            continue
        scores = np.concatenate([np.asarray(entry["dtScores"], dtype=np.float64) for entry in entries])
        order = np.argsort(-scores, kind="stable")
        images = np.repeat([position[entry["image_id"]] for entry in entries], [len(e["dtScores"]) for e in entries])
        matched = np.concatenate([entry["dtMatches"] for entry in entries], axis=1)[:, order] > 0
        ignored = np.concatenate([entry["dtIgnore"] for entry in entries], axis=1)[:, order].astype(bool)
        found.append(ClassMatches(images[order], matched & ~ignored, ignored, num_objects))
    return tuple(found)


def _mean(values: np.ndarray) -> float:
    """Mean of what pycocotools defines (it writes -1 elsewhere), NaN where that is nothing."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else float("nan")


def _mean_of_defined(curves: np.ndarray) -> np.ndarray:
    """[K, T, R] -> [R], over classes and thresholds that are not NaN; NaN where none is."""
    is_defined = ~np.isnan(curves)
    count = is_defined.sum(axis=(0, 1))
    total = np.where(is_defined, curves, 0.0).sum(axis=(0, 1))
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
