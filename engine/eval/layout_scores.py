"""How good proposed layouts are: against the real layouts of the same captions, and by themselves.

    class_f1        2 M / (P + R): M sums, over images and classes, the smaller of the proposed and the real count;
                    P and R are all proposed and all real boxes (micro-averaged)
    count_accuracy  share of images with as many boxes as the real one
    miou            mean IoU of real boxes, paired one to one within each class so that the total is largest; 0 where a
                    box has no partner
    overlap         mean over images of sum over i != j of area(i and j) / area(i), divided by the number of boxes
    alignment       mean over images of the mean over boxes of -log(1 - d), d the smallest distance between an edge or
                    centre of the box and the same one of another (LayoutGAN++, arXiv:2108.00871); 0 is aligned
    layout_fd       Frechet distance of Gaussians fitted to nine numbers of each layout: its count, means and standard
                    deviations of centres and sides; in units of the real layouts' standard deviations. It is no FID

Where captions leave places open, a good layout has a low miou: compare with the scores of shuffled captions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from engine.eval.frechet import FrechetStatistics, frechet_distance
from engine.eval.layout_metrics import centres, pairwise_iou, shared_areas
from engine.plan.matches import class_f1
from util.boxes import areas
from util.types import Layout


@dataclass(frozen=True)
class LayoutScores:
    """Of one set of layouts against the real ones; see above. NaN where nothing can be said."""

    class_f1: float
    count_accuracy: float
    miou: float
    overlap: float
    alignment: float
    layout_fd: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def score_layouts(proposed: Sequence[Layout], real: Sequence[Layout]) -> LayoutScores:
    """proposed[i] was made for the caption of real[i]. Raises ValueError if they differ in number, or there is none."""
    if len(proposed) != len(real) or not real:
        raise ValueError(f"layouts are compared one to one, got {len(proposed)} proposed and {len(real)} real ones")
    pairs = list(zip(proposed, real, strict=True))
    ious = np.concatenate([paired_ious(mine, other) for mine, other in pairs])
    return LayoutScores(
        class_f1=class_f1(proposed, real),
        count_accuracy=float(np.mean([len(mine) == len(other) for mine, other in pairs])),
        miou=float(ious.mean()) if len(ious) else math.nan,
        overlap=_mean([overlap(_boxes(layout)) for layout in proposed]),
        alignment=_mean([alignment(_boxes(layout)) for layout in proposed]),
        layout_fd=layout_distance(proposed, real),
    )


def paired_ious(proposed: Layout, real: Layout) -> np.ndarray:
    """Of each real box, [n]: the IoU with its partner, 0 without one."""
    ious = pairwise_iou(_boxes(real), _boxes(proposed))
    ious = ious * (real.categories.numpy()[:, None] == proposed.categories.numpy()[None, :])
    rows, columns = linear_sum_assignment(ious, maximize=True)
    found = np.zeros(len(real))
    found[rows] = ious[rows, columns]
    return found


def overlap(boxes_xyxy: np.ndarray) -> float:
    """[n, 4] -> how much of a box others cover, a box counted as often as it is covered; NaN without boxes."""
    if len(boxes_xyxy) == 0:
        return math.nan
    shares = shared_areas(boxes_xyxy, boxes_xyxy) / areas(boxes_xyxy)[:, None]
    np.fill_diagonal(shares, 0)
    return float(shares.sum() / len(boxes_xyxy))


def alignment(boxes_xyxy: np.ndarray) -> float:
    """[n, 4] -> see above; NaN for fewer than two boxes."""
    if len(boxes_xyxy) < 2:
        return math.nan
    lines = np.concatenate([boxes_xyxy, centres(boxes_xyxy)], axis=1)  # [n, 6]
    gaps = np.abs(lines[:, None] - lines[None]).min(axis=2)  # [n, n]
    np.fill_diagonal(gaps, np.inf)
    return float(-np.log1p(-np.minimum(gaps.min(axis=1), 1 - 1e-9)).mean())


def layout_distance(proposed: Sequence[Layout], real: Sequence[Layout]) -> float:
    """See above; NaN for fewer than two layouts."""
    if len(real) < 2:
        return math.nan
    mine, others = _statistics(proposed), _statistics(real)
    spread = others.std(axis=0)
    spread[spread == 0] = 1
    return frechet_distance(FrechetStatistics.of(mine / spread), FrechetStatistics.of(others / spread)).value


def _statistics(layouts: Sequence[Layout]) -> np.ndarray:
    """[n, 9]: boxes, means and standard deviations of centre x, centre y, width, height; zeros without boxes."""
    rows = np.zeros((len(layouts), 9))
    for row, layout in zip(rows, layouts, strict=True):
        boxes = _boxes(layout)
        if len(boxes):
            parts = np.concatenate([centres(boxes), boxes[:, 2:] - boxes[:, :2]], axis=1)
            row[:] = np.concatenate([[len(boxes)], parts.mean(axis=0), parts.std(axis=0)])
    return rows


def _boxes(layout: Layout) -> np.ndarray:
    return layout.boxes_xyxy.double().numpy()


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan
