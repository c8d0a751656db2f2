"""How well a picture follows its layout: wanted boxes against the boxes that a detector finds in it.

Within each class, wanted and detected boxes are paired one to one so that the total IoU is largest (the Hungarian
method); pairs that do not overlap are no pairs. A wanted box without a partner has IoU 0, so a detector that finds
nothing scores 0. A success is a pair with IoU >= 0.5. Every metric is a ratio of two sums over images, which makes a
bootstrap resample one matrix product. What is left out: the ranking of detections by confidence, which AP measures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from engine.eval.ap import check_detections
from util.boxes import areas, xywh_to_xyxy

if TYPE_CHECKING:
    from engine.eval.targets import Target

LAYOUT_METRICS = (
    "mIoU",
    "mIoU_image",
    "SR50",
    "SR50_image",
    "precision",
    "extra_rate",
    "centroid_distance",
    "confidence",
)
SUCCESS_IOU = 0.5
IGNORE_SHARE = 0.5  # of a detection's area inside an ignore region
CONFIDENCE_WEIGHT = 1e-9  # decides between equal IoUs only: the more confident one is the partner


@dataclass(frozen=True)
class ImageScore:
    """One picture against its n wanted boxes.

    category_ids, areas_px, ious, scores, distances: [n]. ious and scores (the partner's confidence) are 0 where the
    object is missing; distances (between centres, as a fraction of the picture's diagonal) are NaN there.
    num_detected: confident detections outside ignore regions. num_extra: those of them that are no success.
    """

    image_id: int
    category_ids: np.ndarray
    areas_px: np.ndarray
    ious: np.ndarray
    scores: np.ndarray
    distances: np.ndarray
    num_detected: int
    num_extra: int


def score_image(target: Target, detections_of_image: Sequence[Mapping[str, Any]], match_score: float) -> ImageScore:
    """Scores the detections ({image_id, category_id, bbox xywh in output pixels, score}) of one picture.

    Wanted are the boxes that the model was given (crowds too, where a profile gives them); all other visible boxes are
    ignore regions: a detection without partner that lies at least half in one of its class is neither right nor wrong.
    The order of detections does not matter. Raises ValueError for detections of another image.
    """
    check_detections(detections_of_image, [target.image_id])
    is_wanted = target.conditioned
    wanted, wanted_ids = target.boxes_px[is_wanted], target.category_ids[is_wanted]
    boxes, category_ids, confidences = _confident(detections_of_image, match_score)
    ious = np.where(wanted_ids[:, None] == category_ids[None, :], pairwise_iou(wanted, boxes), 0.0)  # [n, D]
    rows, columns = pair_boxes(ious, confidences)

    scores, distances, paired = np.zeros(len(wanted)), np.full(len(wanted), np.nan), np.zeros(len(wanted))
    paired[rows], scores[rows] = ious[rows, columns], confidences[columns]
    distances[rows] = np.linalg.norm(centres(wanted[rows]) - centres(boxes[columns]), axis=1) / np.hypot(*target.size)

    is_ignored = _inside(boxes, category_ids, target.boxes_px[~is_wanted], target.category_ids[~is_wanted])
    is_ignored[columns] = False
    num_detected = int(len(boxes) - is_ignored.sum())
    num_extra = num_detected - int((paired >= SUCCESS_IOU).sum())
    return ImageScore(target.image_id, wanted_ids, areas(wanted), paired, scores, distances, num_detected, num_extra)


def summarize(scores: Sequence[ImageScore], weights: np.ndarray | None = None) -> Mapping[str, float]:
    """LAYOUT_METRICS over images; weights: [num_images] multiplicities, default 1.

    mIoU, SR50, confidence: over instances. mIoU_image, SR50_image (all right): over images that want something.
    precision: successes / detections. extra_rate: per image. centroid_distance: over pairs. NaN for 0 / 0.
    """
    row = np.ones(len(scores)) if weights is None else np.asarray(weights)
    if row.ndim != 1:
        raise ValueError(f"weights must be one number per image [{len(scores)}], got shape {row.shape}")
    return {name: float(values[0]) for name, values in resample(scores, row[None]).items()}


def resample(scores: Sequence[ImageScore], weights: np.ndarray) -> Mapping[str, np.ndarray]:
    """LAYOUT_METRICS, each [R], when image i counts weights[r, i] times. weights: [R, num_images], none negative."""
    weights = np.asarray(weights, dtype=np.float64)
    if weights.ndim != 2 or weights.shape[1] != len(scores):
        raise ValueError(f"weights must be [R, {len(scores)}], got shape {weights.shape}")
    if not (weights >= 0).all():
        raise ValueError("weights are multiplicities of images: none may be negative or NaN")
    terms = np.array([_terms(score) for score in scores]).reshape(len(scores), len(LAYOUT_METRICS), 2)
    totals = np.einsum("rn,nmk->rmk", weights, terms)  # numerators and denominators
    ratios = np.divide(totals[..., 0], totals[..., 1], out=np.full(totals.shape[:2], np.nan), where=totals[..., 1] > 0)
    return {name: ratios[:, m] for m, name in enumerate(LAYOUT_METRICS)}


def by_class(scores: Sequence[ImageScore]) -> Mapping[int, Mapping[str, float]]:
    """Category id -> count, mIoU and SR50 of its wanted boxes, for the categories that have any, by id."""
    category_ids = _gather(scores, "category_ids").astype(np.int64)
    ious = _gather(scores, "ious")
    return {int(each): _instances(ious[category_ids == each]) for each in np.unique(category_ids)}


def by_size(scores: Sequence[ImageScore], area_edges_px: tuple[float, float]) -> Mapping[str, Mapping[str, float]]:
    """small < e0^2 <= medium < e1^2 <= large -> count, mIoU and SR50; NaN where the count is 0. Edges in pixels."""
    if not 0 < area_edges_px[0] < area_edges_px[1]:
        raise ValueError(f"area_edges_px must rise from above 0, got {area_edges_px}")
    size = np.digitize(_gather(scores, "areas_px"), np.square(area_edges_px))
    ious = _gather(scores, "ious")
    return {name: _instances(ious[size == i]) for i, name in enumerate(("small", "medium", "large"))}


def _terms(score: ImageScore) -> list[tuple[float, float]]:
    """(numerator, denominator) of each of LAYOUT_METRICS, in their order."""
    num_wanted = len(score.ious)
    is_success = score.ious >= SUCCESS_IOU
    wants = float(num_wanted > 0)
    is_paired = ~np.isnan(score.distances)
    return [
        (score.ious.sum(), num_wanted),
        (score.ious.mean() if num_wanted else 0.0, wants),
        (is_success.sum(), num_wanted),
        (wants * is_success.all(), wants),
        (score.num_detected - score.num_extra, score.num_detected),
        (score.num_extra, 1),
        (score.distances[is_paired].sum(), is_paired.sum()),
        (score.scores.sum(), num_wanted),
    ]


def _confident(
    detections: Sequence[Mapping[str, Any]], match_score: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """xyxy boxes [D, 4], category ids [D], scores [D] of the detections with at least that score, in a fixed order."""
    kept = [each for each in detections if each["score"] >= match_score]
    kept.sort(key=lambda each: (-each["score"], each["category_id"], *each["bbox"]))
    boxes = xywh_to_xyxy(np.array([each["bbox"] for each in kept], dtype=np.float64).reshape(-1, 4))
    category_ids = np.array([each["category_id"] for each in kept], dtype=np.int64)
    return boxes, category_ids, np.array([each["score"] for each in kept], dtype=np.float64)


def pair_boxes(gains: np.ndarray, confidences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One-to-one pairs (rows, columns) of the largest total gain. gains: [n, D] >= 0 (IoUs), 0 where none may be.

    Of equal gains the more confident column wins. confidences: [D] in [0, 1].
    One assignment over all classes is one within each: pairs across classes gain nothing and are dropped.
    """
    total = np.where(gains > 0, gains + CONFIDENCE_WEIGHT * confidences, 0.0)
    rows, columns = linear_sum_assignment(total, maximize=True)
    is_pair = gains[rows, columns] > 0
    return rows[is_pair], columns[is_pair]


def pairwise_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union [n, m] of xyxy boxes [n, 4] and [m, 4]; 0 for a box without area."""
    shared = shared_areas(first, second)
    return _ratio(shared, areas(first)[:, None] + areas(second)[None, :] - shared)


def centres(boxes_xyxy: np.ndarray) -> np.ndarray:
    """[n, 4] -> [n, 2]."""
    return (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2


def _inside(boxes: np.ndarray, category_ids: np.ndarray, regions: np.ndarray, region_ids: np.ndarray) -> np.ndarray:
    """[D] bool: at least half of the box lies in one region of its class."""
    share = _ratio(shared_areas(boxes, regions), areas(boxes)[:, None])
    is_same_class = category_ids[:, None] == region_ids[None, :]
    return (is_same_class & (share >= IGNORE_SHARE)).any(axis=1)


def shared_areas(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Areas [n, m] that xyxy boxes [n, 4] and [m, 4] share."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    return np.clip(high - low, 0.0, None).prod(axis=2)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """numerator / denominator, 0 where the denominator is 0 (a box without area shares nothing)."""
    denominator = np.broadcast_to(denominator, numerator.shape)
    return np.divide(numerator, denominator, out=np.zeros(numerator.shape), where=denominator > 0)


def _gather(scores: Sequence[ImageScore], name: str) -> np.ndarray:
    return np.concatenate([np.zeros(0), *(vars(score)[name] for score in scores)])


def _instances(ious: np.ndarray) -> dict[str, float]:
    if len(ious) == 0:
        return {"count": 0, "mIoU": float("nan"), "SR50": float("nan")}
    return {"count": len(ious), "mIoU": float(ious.mean()), "SR50": float((ious >= SUCCESS_IOU).mean())}
