"""The reward of a generated image: how well a frozen detector's boxes fit the layout that was asked for.

Detections with score >= min_score count, with presence p = min(1, score / full_credit_score): above full_credit_score
this is the usual hard threshold, below it the reward still rises with every gain in confidence. Wanted and detected
boxes of one class with IoU >= iou_floor are paired one to one so that the total of p * IoU is largest (the Hungarian
method; of equal totals the more confident boxes). Means over the wanted boxes, 0 (miss: 1) where one has no partner:

    iou         p * IoU
    confidence  the partner's score
    centroid    p * (1 - distance of the centres / diagonal of the picture)
    miss        1 - p
    extra       the sum of p over detections without partner / number of wanted boxes, at most MAX_EXTRA

    reward = w_iou iou + w_confidence confidence + w_centroid centroid - w_miss miss - w_extra extra + w_quality quality

The default weights are the paper's (1, 0.2, 0.2, 0.1, 0.05). The matching is not the one of its released code, which
is greedy, by area, and ignores classes: here a box of another class or far away earns nothing and costs its share of
extra, and one box counts for one object.

Left out: objects that the layout does not list but the picture may well contain (they count as extra, by a small
weight), overlap with crowds, and any judgement of looks (the optional quality term).

Shape letters: n images, or wanted boxes of one image; D detections of one image; H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from engine.eval.judge import Judge
from engine.eval.layout_metrics import centres, pair_boxes, pairwise_iou
from engine.rl.credit import RegionRewards
from engine.rl.settings import RewardSettings, RewardWeights
from models.frozen.detections import Detections
from util.images import to_picture
from util.types import Category, LayoutBatch

if TYPE_CHECKING:
    from models.frozen.clip_score import ClipScorer

PARTS = ("iou", "confidence", "centroid", "miss", "extra")
QUALITY = "quality"  # a part only where a quality function is given
PENALTIES = ("miss", "extra")
MAX_EXTRA = 10.0  # per wanted box: one picture full of boxes shall not set the scale of its whole group

Quality: TypeAlias = Callable[[Tensor, Sequence[str]], Tensor]  # images [n, 3, H, W] in [0, 1], n prompts -> [n]


@dataclass(frozen=True)
class RewardBatch:
    """total: [n] float32; parts: PARTS (and "quality", where there is one), each [n] float32; on the images' device.

    detections: of each image, on the CPU, with the dataset's category ids; those of other categories are left out.
    regions: of each image, on the CPU, where in it `total` was earned, but for its quality.
    """

    total: Tensor
    parts: dict[str, Tensor]
    detections: list[Detections]
    regions: list[RegionRewards]


class LayoutReward:
    """Rewards of images by a detector, and optionally a quality function (see `clip_quality`).

    The detector's own threshold must not lie above settings.min_score, or the reward is less dense than it says.
    Raises ValueError for a detector that does not know all categories and a weight for quality without a function.
    """

    def __init__(
        self,
        judge: Judge,
        categories: Sequence[Category],
        weights: RewardWeights,
        settings: RewardSettings,
        batch_size: int,
        quality: Quality | None = None,
    ) -> None:
        known = set(judge.dataset_id.values())
        unknown = [category.name for category in categories if category.id not in known]
        if unknown:
            raise ValueError(f"the detector ({judge.detector.arch}) cannot reward {', '.join(unknown)}: unknown to it")
        if weights.quality > 0 and quality is None:
            raise ValueError(f"the reward weight quality is {weights.quality}, but there is no quality function")
        self.judge, self.weights, self.settings = judge, weights, settings
        self.batch_size, self.quality = batch_size, quality
        self.category_ids = np.array([category.id for category in categories], dtype=np.int64)  # index -> dataset id

    @property
    def detector_id(self) -> str:
        return self.judge.detector.id

    @torch.no_grad()
    def __call__(self, images: Tensor, layout: LayoutBatch, prompts: Sequence[str]) -> RewardBatch:
        """images: [n, 3, H, W] in [0, 1] on the detector's device; layout: n rows of contiguous category indices.

        An image's reward does not depend on its batch mates. Raises ValueError for numbers of rows that differ, pixels
        out of range, a row without boxes (named) and a quality that is not [n] finite numbers.
        """
        _check_rows(images, layout, prompts)
        detections: list[Detections] = []
        for start in range(0, len(images), self.batch_size):
            detections += map(self._in_dataset_ids, self.judge.detector(list(images[start : start + self.batch_size])))
        size, layout = (images.shape[3], images.shape[2]), layout.to("cpu")
        verdicts = [self._verdict_on_row(layout, row, found, size) for row, found in enumerate(detections)]
        values = {name: np.array([each.parts[name] for each in verdicts]) for name in PARTS}
        if self.quality is not None:
            values[QUALITY] = self._quality_of(self.quality, images, prompts)
        parts = {name: _float_tensor(value, images.device) for name, value in values.items()}  # each [n]
        total = _float_tensor(total_reward(values, self.weights), images.device)  # [n]
        regions = [self._regions(each, found, size) for each, found in zip(verdicts, detections, strict=True)]
        return RewardBatch(total, parts, detections, regions)

    def _in_dataset_ids(self, found: Detections) -> Detections:
        dataset_id = self.judge.dataset_id
        ids = found.category_ids.tolist()
        kept = torch.tensor([category_id in dataset_id for category_id in ids], dtype=torch.bool)  # [D]
        category_ids = torch.tensor([dataset_id[each] for each in ids if each in dataset_id], dtype=torch.int64)
        return Detections(found.boxes_px.float().cpu()[kept], category_ids, found.scores.float().cpu()[kept])

    def _verdict_on_row(self, layout: LayoutBatch, row: int, found: Detections, size: tuple[int, int]) -> LayoutVerdict:
        """layout: on the CPU. size: (width, height) of the picture in pixels."""
        valid = layout.valid[row]
        return layout_verdict(
            layout.boxes_xyxy[row][valid].numpy(),
            self.category_ids[layout.categories[row][valid].numpy()],
            found.boxes_px.numpy() / np.array([*size, *size], dtype=np.float64),
            found.category_ids.numpy(),
            found.scores.numpy(),
            self.settings,
            size,
        )

    def _regions(self, verdict: LayoutVerdict, found: Detections, size: tuple[int, int]) -> RegionRewards:
        presence = _float_tensor(verdict.extra_presence, torch.device("cpu"))  # [D]
        is_extra = presence > 0 if self.weights.extra > 0 else torch.zeros_like(presence, dtype=torch.bool)  # [D]
        of_boxes = _float_tensor(total_reward(verdict.of_boxes, self.weights), torch.device("cpu"))  # [n]
        boxes_xyxy = found.boxes_px[is_extra] / torch.tensor([*size, *size])  # [m, 4]
        return RegionRewards(of_boxes, boxes_xyxy.clamp(0, 1), presence[is_extra])

    def _quality_of(self, quality: Quality, images: Tensor, prompts: Sequence[str]) -> np.ndarray:
        values = []
        for start in range(0, len(images), self.batch_size):
            rows = slice(start, start + self.batch_size)
            values.append(_checked_quality(quality(images[rows], prompts[rows]), len(images[rows])))
        return np.concatenate(values)


@dataclass(frozen=True)
class LayoutVerdict:
    """How one picture fits its layout. parts: each of PARTS. of_boxes: the same without `extra` for each wanted box,
    [n] in the order given; the parts are their means. extra_presence: [D], p of the detections that no wanted box
    claimed, 0 for the others, in the order given."""

    parts: dict[str, float]
    of_boxes: dict[str, np.ndarray]
    extra_presence: np.ndarray


def layout_verdict(
    wanted_xyxy: np.ndarray,
    wanted_categories: np.ndarray,
    boxes_xyxy: np.ndarray,
    categories: np.ndarray,
    scores: np.ndarray,
    settings: RewardSettings,
    aspect: tuple[float, float],
) -> LayoutVerdict:
    """Of one image; the order of wanted and detected boxes does not matter to the parts, not even to the last bit.

    wanted_xyxy: [n, 4] in [0, 1], n >= 1; wanted_categories: [n]; boxes_xyxy: [D, 4] in [0, 1]; categories: [D], ids
    of the same kind; scores: [D] in [0, 1]; aspect: (width, height) of the picture in any unit, for distances.
    Raises ValueError for other shapes, no wanted box, numbers that are not finite, and scores out of range.
    """
    wanted, wanted_ids = _checked("wanted", wanted_xyxy, wanted_categories)
    boxes, box_ids = _checked("detected", boxes_xyxy, categories)
    confidences = np.asarray(scores, dtype=np.float64)
    if confidences.shape != box_ids.shape or not ((confidences >= 0) & (confidences <= 1)).all():
        raise ValueError(f"scores must be [{len(box_ids)}] in [0, 1], got {confidences.shape}: {confidences.tolist()}")
    if len(wanted) == 0:
        raise ValueError("a layout reward needs at least one wanted box, got none")

    wanted_order = _fixed_order(wanted, wanted_ids, np.zeros(len(wanted)))  # [n]
    wanted, wanted_ids = wanted[wanted_order], wanted_ids[wanted_order]
    counted = np.flatnonzero(confidences >= settings.min_score)
    box_order = counted[_fixed_order(boxes[counted], box_ids[counted], confidences[counted])]  # [of D]
    num_found, boxes, box_ids, confidences = len(boxes), boxes[box_order], box_ids[box_order], confidences[box_order]
    presence = np.minimum(1.0, confidences / settings.full_credit_score)  # [D]
    ious = pairwise_iou(wanted, boxes)  # [n, D]
    is_allowed = (wanted_ids[:, None] == box_ids[None, :]) & (ious >= settings.iou_floor)  # [n, D]
    rows, columns = pair_boxes(np.where(is_allowed, presence * ious, 0.0), confidences)

    is_extra = np.ones(len(boxes), dtype=bool)
    is_extra[columns] = False
    p, num_wanted = presence[columns], len(wanted)
    distances = np.linalg.norm((centres(wanted[rows]) - centres(boxes[columns])) * aspect, axis=1) / np.hypot(*aspect)
    of_pairs = {"iou": p * ious[rows, columns], "confidence": confidences[columns], "centroid": p * (1 - distances)}
    parts = {name: float(values.sum() / num_wanted) for name, values in of_pairs.items()}
    parts |= {
        "miss": float(1 - p.sum() / num_wanted),
        "extra": min(MAX_EXTRA, float(presence[is_extra].sum() / num_wanted)),
    }
    of_boxes = {name: np.zeros(num_wanted) for name in of_pairs} | {"miss": np.ones(num_wanted)}  # each [n]
    for name, values in (of_pairs | {"miss": 1 - p}).items():
        of_boxes[name][wanted_order[rows]] = values
    extra_presence = np.zeros(num_found)  # [D]
    extra_presence[box_order[is_extra]] = presence[is_extra]
    return LayoutVerdict(parts, of_boxes, extra_presence)


def total_reward(parts: Mapping[str, np.ndarray], weights: RewardWeights) -> np.ndarray:
    """The weighted sum over the parts that are there, each [n] -> [n]; penalties are subtracted."""
    weight_of = asdict(weights)
    terms = [value * (-weight_of[name] if name in PENALTIES else weight_of[name]) for name, value in parts.items()]
    return np.sum(terms, axis=0)


def clip_quality(scorer: ClipScorer) -> Quality:
    """CLIP's cosine of each picture and its own prompt (about 0.15 to 0.4) as the quality of images in [0, 1]."""

    def quality(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return scorer.clip_scores([to_picture(2 * image - 1) for image in images], prompts)  # [n]

    return quality


def _fixed_order(boxes: np.ndarray, category_ids: np.ndarray, confidences: np.ndarray) -> np.ndarray:
    """Positions by score, the best first, then by category and corners: ties and rounding then have one outcome."""
    order: np.ndarray = np.lexsort((*boxes.T, category_ids, -confidences))
    return order


def _checked(what: str, boxes_xyxy: np.ndarray, category_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    boxes, ids = np.asarray(boxes_xyxy, dtype=np.float64), np.asarray(category_ids)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or ids.shape != boxes.shape[:1]:
        raise ValueError(f"{what} boxes must be [k, 4] with categories [k], got {boxes.shape} and {ids.shape}")
    if not np.isfinite(boxes).all():
        raise ValueError(f"{what} boxes must be finite, got {boxes.tolist()}")
    return boxes, ids


def _check_rows(images: Tensor, layout: LayoutBatch, prompts: Sequence[str]) -> None:
    if images.dim() != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(f"images must be [n, 3, H, W] with n >= 1, got {list(images.shape)}")
    if not len(images) == len(layout) == len(prompts):
        counts = f"{len(images)} images, {len(layout)} layouts and {len(prompts)} prompts"
        raise ValueError(f"every image needs its layout and its prompt, got {counts}")
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and high <= 1):  # also refuses NaN
        raise ValueError(f"images must lie in [0, 1], got values from {low} to {high}")
    empty = torch.nonzero(~layout.valid.any(1)).flatten().tolist()
    if empty:
        raise ValueError(f"row {empty[0]} has no boxes (prompt: {prompts[empty[0]]!r}): a layout reward needs some")


def _checked_quality(values: Tensor, num_images: int) -> np.ndarray:
    if values.shape != (num_images,) or not bool(torch.isfinite(values).all()):
        raise ValueError(f"quality must be [{num_images}] finite numbers, got {list(values.shape)}: {values.tolist()}")
    return values.double().cpu().numpy()


def _float_tensor(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device, torch.float32)
