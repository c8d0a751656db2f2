"""Numbers of one evaluated model for the comparison of reward fine-tunings, each with its bootstrap resamples.

They are made again from what `scripts.evaluate_layout` leaves (ground truth, detections, per_image.jsonl), because its
results.json holds intervals, and a gain over another model needs resamples of both: the same layouts are drawn for
both, so that what makes a layout hard for both cancels.

    gain_r = value_r(model) - value_r(baseline),   r = 1, ..., R resamples of the layouts

The mean reward is engine/rl/rewards.py's with its default weights, by whatever detector evaluated, and of all pictures
of all seeds. What the intervals leave out: the spread over seeds and over trainings.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.eval import compare
from engine.eval.compare import Evaluation, Measured, per_image_sums, precision, ratio
from engine.rl.rewards import layout_verdict, total_reward
from engine.rl.settings import RewardSettings, RewardWeights
from util.boxes import xywh_to_xyxy

Json = dict[str, Any]
MEASURES = ("reward", "AP50", "mIoU", "SR50", "extra")
NUM_RESAMPLES = 500


def load_evaluation(folder: Path, num_resamples: int = NUM_RESAMPLES) -> Evaluation:
    """Raises FileNotFoundError, or ValueError for results of another format; both name the file."""
    return compare.load_evaluation(folder, num_resamples, kinds=("conditioned",))


def measure(evaluation: Evaluation, row: str) -> dict[str, Measured]:
    """MEASURES of the row of that name: reward (per image), AP50, mIoU and SR50 (shares), extra (detections per image).

    Raises FileNotFoundError naming the file that is missing, ValueError for a row that is not there.
    """
    runs = evaluation.detections(row)
    sums = per_image_sums(evaluation, row)
    rewards = np.mean([image_rewards(evaluation, detections) for detections in runs], axis=0)  # [N]
    return {
        "reward": ratio(rewards, np.ones(len(rewards)), evaluation.weights),
        "AP50": precision(evaluation, "conditioned", runs)["AP50"],
        "mIoU": ratio(*sums["mIoU"], evaluation.weights),
        "SR50": ratio(*sums["SR50"], evaluation.weights),
        "extra": ratio(*sums["extra_rate"], evaluation.weights),
    }


def image_rewards(evaluation: Evaluation, detections: Sequence[Json]) -> np.ndarray:
    """The reward of each picture of one seed [N], by the detector that found `detections` (COCO results)."""
    found: defaultdict[int, list[Json]] = defaultdict(list)
    wanted: defaultdict[int, list[Json]] = defaultdict(list)
    for entry in detections:
        found[entry["image_id"]].append(entry)
    truth = evaluation.ground_truth["conditioned"]
    for entry in truth["annotations"]:
        if not entry["iscrowd"]:
            wanted[entry["image_id"]].append(entry)
    sizes = {image["id"]: (image["width"], image["height"]) for image in truth["images"]}
    parts = [_reward_parts(wanted[image_id], found[image_id], sizes[image_id]) for image_id in evaluation.image_ids]
    by_part = {name: np.array([each[name] for each in parts]) for name in parts[0]}
    return total_reward(by_part, RewardWeights())


def _reward_parts(wanted: Sequence[Json], found: Sequence[Json], size: tuple[int, int]) -> Mapping[str, float]:
    scale = np.array([*size, *size], dtype=np.float64)
    return layout_verdict(
        _boxes_xyxy(wanted) / scale,
        np.array([entry["category_id"] for entry in wanted]),
        _boxes_xyxy(found) / scale,
        np.array([entry["category_id"] for entry in found], dtype=np.int64),
        np.array([entry["score"] for entry in found], dtype=np.float64),
        RewardSettings(),
        size,
    ).parts


def _boxes_xyxy(entries: Sequence[Json]) -> np.ndarray:
    return xywh_to_xyxy(np.array([entry["bbox"] for entry in entries], dtype=np.float64).reshape(-1, 4))
