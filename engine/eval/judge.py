"""Scores pictures against layouts: detect, compare with ground truth, and put every number beside its bounds.

A row of the table is a set of pictures of the same targets: real images through the profile's geometry and through the
VAE (bounds), a model's images by one or several seeds, and the model's detections handed to other images' layouts
(control, about 0). Numbers of several seeds are means over them; intervals are a bootstrap over images, in which all
seeds draw the same images. Nothing here samples images (`engine/eval/generation.py`) or reads flags.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from engine.eval import layout_metrics
from engine.eval.ap import METRICS, ApResult, average_precision
from engine.eval.bootstrap import BOOTSTRAP_SEED, Interval, bootstrap_weights, interval
from engine.eval.layout_metrics import LAYOUT_METRICS, ImageScore, score_image
from engine.eval.pictures import PictureOf
from engine.eval.targets import EvalSet, Target
from models.frozen.detections import BoxDetector, Detections
from util.boxes import xywh_to_xyxy
from util.distributed import DistInfo, gather_objects
from util.types import Category

SUCCESS_IOU = 0.5
COMPARED = (("conditioned", "AP"), ("conditioned", "AP50"), ("layout", "mIoU"))

Json = dict[str, Any]


@dataclass(frozen=True)
class Judge:
    """A detector whose categories are mapped to a dataset's by name. dataset_id: the detector's id -> the dataset's."""

    detector: BoxDetector
    dataset_id: Mapping[int, int]

    @classmethod
    def of(cls, detector: BoxDetector, categories: Sequence[Category], skipped: Collection[str] = ()) -> Judge:
        """skipped: names nobody asks for. Raises ValueError listing the other categories the detector does not know."""
        unknown = [name for name in unknown_categories(detector, categories) if name not in skipped]
        if unknown:
            raise ValueError(
                f"the detector ({detector.arch}) knows {len(detector.categories)} categories, but not "
                f"{', '.join(unknown)} of the dataset's {len(categories)}: pass --skip_unknown to leave these out"
            )
        id_of = {category.name: category.id for category in categories}
        return cls(detector, {c.id: id_of[c.name] for c in detector.categories if c.name in id_of})


def unknown_categories(detector: BoxDetector, categories: Sequence[Category]) -> list[str]:
    """Names of the dataset's categories that the detector cannot find."""
    known = {category.name for category in detector.categories}
    return [category.name for category in categories if category.name not in known]


@dataclass(frozen=True)
class Row:
    """One line of the table before scoring. detections: for each seed COCO result entries. kind: bound, model, control.

    seeds: one name per list of detections; None where nothing was drawn at random.
    """

    name: str
    kind: str
    seeds: tuple[int | None, ...]
    detections: tuple[list[Json], ...]


def detect(
    judge: Judge,
    targets: Sequence[Target],
    picture_of: PictureOf,
    dist: DistInfo,
    batch_size: int,
    on_batch: Callable[[], None] | None = None,
) -> list[Json]:
    """COCO result entries of all targets, on every process; each takes its share of the batches."""
    batches = detection_batches(targets, batch_size)
    own: list[Json] = []
    for batch in batches[dist.rank :: dist.world_size]:
        pictures = [torch.from_numpy(np.array(picture_of(target))) for target in batch]  # [H, W, 3]
        images = [(picture.permute(2, 0, 1).float() / 255).to(dist.device) for picture in pictures]  # [3, H, W]
        for target, found in zip(batch, judge.detector(images), strict=True):
            own += result_entries(target.image_id, found, judge.dataset_id)
        if on_batch is not None:
            on_batch()
    entries = [entry for part in gather_objects(own) for entry in part]
    return sorted(entries, key=lambda entry: (entry["image_id"], -entry["score"]))


def detection_batches(targets: Sequence[Target], batch_size: int) -> list[list[Target]]:
    """At most `batch_size` targets each, whose pictures have one size: only these can share a detector's batch."""
    by_size: dict[tuple[int, int], list[Target]] = {}
    for target in targets:
        by_size.setdefault(target.size, []).append(target)
    return [
        alike[start : start + batch_size] for alike in by_size.values() for start in range(0, len(alike), batch_size)
    ]


def result_entries(image_id: int, found: Detections, dataset_id: Mapping[int, int]) -> list[Json]:
    """COCO's result format, with the dataset's category ids; detections of other categories are left out."""
    entries = []
    columns = (found.boxes_px.tolist(), found.category_ids.tolist(), found.scores.tolist())
    for (x0, y0, x1, y1), category_id, score in zip(*columns, strict=True):
        if category_id in dataset_id:
            bbox = [round(value, 3) for value in (x0, y0, x1 - x0, y1 - y0)]
            entries.append(
                {
                    "image_id": image_id,
                    "category_id": dataset_id[category_id],
                    "bbox": bbox,
                    "score": round(score, 6),
                }
            )
    return entries


def shuffle_layouts(targets: Sequence[Target], detections: Sequence[Json]) -> list[Json]:
    """What was found in each image, handed to the next one of the list (the last one's to the first)."""
    ids = [target.image_id for target in targets]
    next_id = dict(zip(ids, ids[1:] + ids[:1], strict=True))
    return [{**entry, "image_id": next_id[entry["image_id"]]} for entry in detections]


class Scorer:
    """Scores rows of one evaluation set; its ground truths and resamples are made once.

    Attributes: eval_set; ground_truth: by kind ("full", "conditioned"), COCO dictionaries at output size.
    """

    def __init__(self, eval_set: EvalSet, num_resamples: int) -> None:
        self.eval_set = eval_set
        self.ground_truth = {kind: eval_set.ground_truth(kind) for kind in ("full", "conditioned")}
        self.image_ids = [target.image_id for target in eval_set.targets]
        self.weights = bootstrap_weights(len(self.image_ids), num_resamples, BOOTSTRAP_SEED)

    def score(self, row: Row) -> tuple[Json, list[Json]]:
        """The row's entry in results.json (shares of the bound come later) and its lines of per_image.jsonl."""
        precisions = {
            kind: [self._average_precision(ground_truth, found) for found in row.detections]
            for kind, ground_truth in self.ground_truth.items()
        }
        scores = [self._layout_scores(found) for found in row.detections]
        entry: Json = {"name": row.name, "kind": row.kind, "num_seeds": len(row.detections)}
        for kind, results in precisions.items():
            entry[kind] = self._precision_numbers(results)
        entry["layout"] = self._layout_numbers(scores)
        entry["per_class"] = self._per_class(precisions["conditioned"], scores)
        every = [score for seed_scores in scores for score in seed_scores]
        by_size = layout_metrics.by_size(every, self.eval_set.profile.area_edges_px)
        entry["per_size"] = {name: _per_seed_count(values, len(scores)) for name, values in by_size.items()}
        lines = []
        for seed, found, seed_scores in zip(row.seeds, row.detections, scores, strict=True):
            lines += self._image_lines(row.name, seed, found, seed_scores)
        return entry, lines

    def _average_precision(self, ground_truth: Json, detections: list[Json]) -> ApResult:
        profile = self.eval_set.profile
        return average_precision(
            ground_truth, detections, self.image_ids, profile.max_detections, profile.area_edges_px
        )

    def _layout_scores(self, detections: Sequence[Json]) -> list[ImageScore]:
        found = by_image(detections)
        threshold = self.eval_set.profile.match_score
        return [score_image(target, found.get(target.image_id, []), threshold) for target in self.eval_set.targets]

    def _precision_numbers(self, results: Sequence[ApResult]) -> Json:
        samples = [result.resample(self.weights) for result in results]
        numbers = {}
        for name in METRICS:
            value = _mean([result.values[name] for result in results])
            if name in samples[0]:
                spread = np.mean([sample[name] for sample in samples], axis=0)
                numbers[name] = asdict(interval(value, spread))
            else:
                numbers[name] = asdict(Interval(value, math.nan, math.nan))
        return numbers

    def _layout_numbers(self, scores: Sequence[Sequence[ImageScore]]) -> Json:
        summaries = [layout_metrics.summarize(seed_scores) for seed_scores in scores]
        samples = [layout_metrics.resample(seed_scores, self.weights) for seed_scores in scores]
        return {
            name: asdict(
                interval(
                    _mean([summary[name] for summary in summaries]),
                    np.mean([sample[name] for sample in samples], axis=0),
                )
            )
            for name in LAYOUT_METRICS
        }

    def _per_class(self, results: Sequence[ApResult], scores: Sequence[Sequence[ImageScore]]) -> Json:
        by_class = layout_metrics.by_class([score for seed_scores in scores for score in seed_scores])
        table = {}
        for category in self.eval_set.categories:
            if category.id in by_class:
                numbers = _per_seed_count(by_class[category.id], len(scores))
                precision = _mean([result.per_class[category.id]["AP50"] for result in results])
                table[category.name] = {**numbers, "AP50": precision}
        return table

    def _image_lines(
        self, name: str, seed: int | None, detections: Sequence[Json], scores: Sequence[ImageScore]
    ) -> list[Json]:
        names = {category.id: category.name for category in self.eval_set.categories}
        found = by_image(detections)
        lines = []
        for target, score in zip(self.eval_set.targets, scores, strict=True):
            kept = [
                entry for entry in found.get(target.image_id, []) if entry["score"] >= self.eval_set.profile.match_score
            ]
            wanted = zip(target.category_ids[target.conditioned], target.boxes_px[target.conditioned], strict=True)
            lines.append(
                {
                    "row": name,
                    "seed": seed,
                    "image_id": target.image_id,
                    "file_name": target.file_name,
                    "prompt": target.scene.prompt,
                    "mIoU": _mean(score.ious.tolist()),
                    "SR50": _mean((score.ious >= SUCCESS_IOU).astype(float).tolist()),
                    "extra": score.num_extra,
                    "wanted": [{"name": names[int(c)], "box": [round(float(v), 3) for v in box]} for c, box in wanted],
                    "detected": [
                        {"name": names[entry["category_id"]], "box": _xyxy(entry["bbox"]), "score": entry["score"]}
                        for entry in kept
                    ],
                    "picture": None,
                }
            )
        return lines


def add_percent_of_bound(rows: Sequence[Json]) -> None:
    """Beside each number that is compared its share of the first bound's, in percent; None where there is no bound."""
    bound = next((row for row in rows if row["kind"] == "bound"), None)
    for row in rows:
        row["percent_of_bound"] = None
        if bound is not None and row is not bound:
            row["percent_of_bound"] = {
                name: _percent(row[part][name]["value"], bound[part][name]["value"]) for part, name in COMPARED
            }


def by_image(detections: Sequence[Json]) -> dict[int, list[Json]]:
    grouped: defaultdict[int, list[Json]] = defaultdict(list)
    for entry in detections:
        grouped[entry["image_id"]].append(entry)
    return dict(grouped)


def without_nan(value: Any) -> Any:
    """The same nested value with every NaN as None, as json wants it."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _xyxy(bbox_xywh: Sequence[float]) -> list[float]:
    return [round(float(value), 3) for value in xywh_to_xyxy(np.asarray(bbox_xywh, dtype=np.float64))]


def _mean(values: Sequence[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan


def _per_seed_count(values: Mapping[str, float], num_seeds: int) -> Json:
    """Means over all seeds' instances; the count is that of one seed."""
    return {**values, "count": int(values["count"]) // num_seeds}


def _percent(value: float, bound: float) -> float:
    return 100 * value / bound if bound > 0 else math.nan
