"""Numbers of one evaluated model for the comparison of reward fine-tunings, each with its bootstrap resamples.

They are made again from what `scripts.evaluate_layout` leaves (ground truth, detections, per_image.jsonl), because its
results.json holds intervals, and a gain over another model needs resamples of both: the same layouts are drawn for
both, so that what makes a layout hard for both cancels.

    gain_r = value_r(model) - value_r(baseline),   r = 1, ..., R resamples of the layouts

The mean reward is engine/rl/rewards.py's with its default weights, by whatever detector evaluated, and of all pictures
of all seeds. What the intervals leave out: the spread over seeds and over trainings.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.eval.ap import average_precision
from engine.eval.bootstrap import Interval, bootstrap_weights, interval
from engine.eval.names import detections_file
from engine.eval.report.page import RESULTS_FORMAT
from engine.rl.rewards import RewardSettings, RewardWeights, layout_reward_parts, total_reward
from util.boxes import xywh_to_xyxy

Json = dict[str, Any]
MEASURES = ("reward", "AP50", "mIoU", "SR50", "extra")
NUM_RESAMPLES = 500
BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class Measured:
    """A number and the same number on R resamples of the layouts: value, samples [R]."""

    value: float
    samples: np.ndarray

    @property
    def interval(self) -> Interval:
        return interval(self.value, self.samples)

    def minus(self, other: Measured) -> Interval:
        """The gain over `other`, resample by resample. Raises ValueError if their numbers differ."""
        if self.samples.shape != other.samples.shape:
            raise ValueError(f"resamples differ in number: {self.samples.shape} and {other.samples.shape}")
        return interval(self.value - other.value, self.samples - other.samples)


@dataclass(frozen=True)
class Evaluation:
    """One folder of `scripts.evaluate_layout`. results: results.json; image_ids: ascending, N of them.

    weights: [R, N], how often each image is drawn.
    """

    folder: Path
    results: Json
    ground_truth: Json
    image_ids: tuple[int, ...]
    weights: np.ndarray


def load_evaluation(folder: Path, num_resamples: int = NUM_RESAMPLES) -> Evaluation:
    """Raises FileNotFoundError, or ValueError for results of another format; both name the file."""
    results = read_json(folder / "results.json")
    if results.get("format") != RESULTS_FORMAT:
        raise ValueError(f"{folder / 'results.json'} has format {results.get('format')!r}, expected {RESULTS_FORMAT!r}")
    ground_truth = read_json(folder / "ground_truth_conditioned.json")
    image_ids = tuple(sorted(int(image["id"]) for image in ground_truth["images"]))
    return Evaluation(
        folder, results, ground_truth, image_ids, bootstrap_weights(len(image_ids), num_resamples, BOOTSTRAP_SEED)
    )


def read_json(path: Path) -> Any:
    """Raises FileNotFoundError naming the file and what makes it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: bash scripts/mini/rl_comparison.sh makes it")
    return json.loads(path.read_text(encoding="utf-8"))


def row_names(evaluation: Evaluation, kind: str) -> list[str]:
    return [row["name"] for row in evaluation.results["rows"] if row["kind"] == kind]


def the_model(evaluation: Evaluation) -> str:
    """The name of the only row of a model. Raises ValueError naming the file if there is not exactly one."""
    names = row_names(evaluation, "model")
    if len(names) != 1:
        raise ValueError(f"{evaluation.folder / 'results.json'}: expected one row of a model, found {names}")
    return names[0]


def measure(evaluation: Evaluation, row: str) -> dict[str, Measured]:
    """MEASURES of the row of that name: reward (per image), AP50, mIoU and SR50 (shares), extra (detections per image).

    Raises FileNotFoundError naming the file that is missing, ValueError for a row that is not there.
    """
    entries = [entry for entry in evaluation.results["rows"] if entry["name"] == row]
    if len(entries) != 1:
        raise ValueError(f"{evaluation.folder / 'results.json'}: expected one row {row!r}, found {len(entries)}")
    is_bound = entries[0]["kind"] == "bound"
    seeds: Sequence[int | None] = [None] if is_bound else evaluation.results["seeds"]
    runs = [read_json(detections_file(evaluation.folder, row, seed)) for seed in seeds]
    lines = _lines_of(evaluation.folder / "per_image.jsonl", row)
    numbers = [_per_image(lines[image_id]) for image_id in evaluation.image_ids]
    overlaps, found, wanted, extra, pictures = np.array(numbers, dtype=np.float64).T  # [N] each, summed over seeds
    rewards = np.mean([image_rewards(evaluation, detections) for detections in runs], axis=0)  # [N]
    ones = np.ones(len(evaluation.image_ids))
    return {
        "reward": _ratio(rewards, ones, evaluation.weights),
        "AP50": _average_precision(evaluation, runs),
        "mIoU": _ratio(overlaps, wanted, evaluation.weights),
        "SR50": _ratio(found, wanted, evaluation.weights),
        "extra": _ratio(extra, pictures, evaluation.weights),
    }


def image_rewards(evaluation: Evaluation, detections: Sequence[Json]) -> np.ndarray:
    """The reward of each picture of one seed [N], by the detector that found `detections` (COCO results)."""
    found: defaultdict[int, list[Json]] = defaultdict(list)
    wanted: defaultdict[int, list[Json]] = defaultdict(list)
    for entry in detections:
        found[entry["image_id"]].append(entry)
    for entry in evaluation.ground_truth["annotations"]:
        if not entry["iscrowd"]:
            wanted[entry["image_id"]].append(entry)
    sizes = {image["id"]: (image["width"], image["height"]) for image in evaluation.ground_truth["images"]}
    parts = [_reward_parts(wanted[image_id], found[image_id], sizes[image_id]) for image_id in evaluation.image_ids]
    by_part = {name: np.array([each[name] for each in parts]) for name in parts[0]}
    return total_reward(by_part, RewardWeights())


def _reward_parts(wanted: Sequence[Json], found: Sequence[Json], size: tuple[int, int]) -> Mapping[str, float]:
    scale = np.array([*size, *size], dtype=np.float64)
    return layout_reward_parts(
        _boxes_xyxy(wanted) / scale,
        np.array([entry["category_id"] for entry in wanted]),
        _boxes_xyxy(found) / scale,
        np.array([entry["category_id"] for entry in found], dtype=np.int64),
        np.array([entry["score"] for entry in found], dtype=np.float64),
        RewardSettings(),
        size,
    )


def _boxes_xyxy(entries: Sequence[Json]) -> np.ndarray:
    return xywh_to_xyxy(np.array([entry["bbox"] for entry in entries], dtype=np.float64).reshape(-1, 4))


def _average_precision(evaluation: Evaluation, runs: Sequence[Sequence[Json]]) -> Measured:
    """AP50, the mean over seeds."""
    settings = evaluation.results["profile"]["settings"]
    edges = (float(settings["area_edges_px"][0]), float(settings["area_edges_px"][1]))
    results = [
        average_precision(evaluation.ground_truth, found, evaluation.image_ids, settings["max_detections"], edges)
        for found in runs
    ]
    samples = np.mean([result.resample(evaluation.weights)["AP50"] for result in results], axis=0)
    return Measured(float(np.mean([result.values["AP50"] for result in results])), samples)


def _lines_of(path: Path, row: str) -> dict[int, list[Json]]:
    """The row's lines of per_image.jsonl by image id, of all seeds."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: bash scripts/mini/rl_comparison.sh makes it")
    lines: defaultdict[int, list[Json]] = defaultdict(list)
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if line["row"] == row:
            lines[line["image_id"]].append(line)
    return lines


def _per_image(lines: Sequence[Json]) -> tuple[float, float, int, int, int]:
    """Of one image over its seeds: sum of IoUs, boxes found (IoU at least 0.5), boxes, extra detections, pictures."""
    overlap, found = (
        sum(line[name] * len(line["wanted"]) for line in lines if line[name] is not None) for name in ("mIoU", "SR50")
    )
    return overlap, found, sum(len(line["wanted"]) for line in lines), sum(line["extra"] for line in lines), len(lines)


def _ratio(numerator: np.ndarray, denominator: np.ndarray, weights: np.ndarray) -> Measured:
    """sum(numerator) / sum(denominator) over images [N], and over each resample [R, N]; NaN for 0 / 0."""
    if denominator.sum() == 0:
        return Measured(float("nan"), np.full(len(weights), np.nan))
    totals = weights @ denominator
    samples = np.divide(weights @ numerator, totals, out=np.full(len(weights), np.nan), where=totals > 0)
    return Measured(float(numerator.sum() / denominator.sum()), samples)
