"""The measurement of scripts/mini/planned_recall.py, which says what it does."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from engine.data.scenes import Scene, scenes_from_dataset, text_scene
from engine.eval.bootstrap import BOOTSTRAP_SEED, Interval, bootstrap_weights, interval
from engine.eval.layout_metrics import pairwise_iou
from engine.plan.propose import layout_generators
from engine.sample.generate import image_generator
from engine.sample.pipeline import StructMARPipeline
from models.frozen.detections import Detections
from models.frozen.faster_rcnn import load_detector
from util.coco import BoxFilters, CocoIndex
from util.distributed import init_distributed
from util.images import Picture
from util.output import write_text_atomic
from util.types import Layout

FORMAT = "structmar-planned-recall-1"
SUCCESS_IOU = 0.5


@dataclass(frozen=True)
class Counts:
    """Of one picture. wanted: objects of the real scene; given: boxes it was drawn with; the rest are found."""

    wanted: int
    found: int
    extra: int
    given: int
    placed: int


def count(labels: Sequence[str], drawn: Scene, found: Detections, names: Mapping[int, str]) -> Counts:
    """labels: of the real scene's objects. found: confident ones only. names: the detector's categories by id."""
    seen = [names[int(category)] for category in found.category_ids]
    hits = (Counter(labels) & Counter(seen)).total()
    boxes = drawn.layout.boxes_xyxy.double().numpy(), found.boxes_px.double().cpu().numpy()
    is_same = np.array([[name == other for other in seen] for name in drawn.names]).reshape(len(drawn.names), len(seen))
    ious = pairwise_iou(*boxes) * is_same
    good = np.where(ious >= SUCCESS_IOU, ious, 0.0)
    rows, columns = linear_sum_assignment(good, maximize=True)
    placed = int((good[rows, columns] > 0).sum())
    return Counts(len(labels), hits, len(seen) - hits, len(drawn.names), placed)


def in_unit_square(found: Detections, picture: Picture, match_score: float) -> Detections:
    """The confident finds, boxes as fractions of the picture."""
    kept = found.scores >= match_score
    height, width = picture.shape[:2]
    scale = torch.tensor([width, height, width, height], device=found.boxes_px.device)
    return Detections(found.boxes_px[kept] / scale, found.category_ids[kept], found.scores[kept])


def with_boxes_of_others(scenes: Sequence[Scene]) -> list[Scene]:
    """Every scene's classes in the boxes of the next scene with as many objects."""
    moved = []
    for row, scene in enumerate(scenes):
        others = [*scenes[row + 1 :], *scenes[:row], scene]
        other = next(each for each in others if len(each.layout) == len(scene.layout))
        moved.append(replace(scene, layout=Layout(other.layout.boxes_xyxy, scene.layout.categories)))
    return moved


def ways(args: argparse.Namespace, pipeline: StructMARPipeline, scenes: Sequence[Scene]) -> dict[str, list[Scene]]:
    """The scenes to draw, by the row's name."""
    planner = pipeline.load_planner(args.planner_path)
    draws = layout_generators([image_generator(args.seed + row) for row in range(len(scenes))])
    captions = [text_scene(scene.prompt) for scene in scenes]
    options = (pipeline.known_labels, pipeline.caption_encoder, draws, args.planner_temperature)
    return {
        "caption only": captions,
        "planned boxes": planner.scenes(captions, *options),
        "boxes of another scene": with_boxes_of_others(scenes),
        "real boxes": list(scenes),
    }


def measure(args: argparse.Namespace) -> dict[str, list[Counts]]:
    """The counts of every scene, by the row's name."""
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    device = init_distributed(args.device).device
    pipeline = StructMARPipeline.from_checkpoint(
        args.resume, args.vae_path, args.clip_path, device,
        max_text_tokens=args.max_text_tokens,
    )  # fmt: skip
    config = pipeline.model.config
    filters = BoxFilters(min_area=args.min_area, max_objects=config.max_objects)
    index = CocoIndex.load(args.coco_root, args.split, filters, config.img_size)
    scenes = scenes_from_dataset(index, config.img_size, args.num_scenes)
    detector = load_detector(args.detector, device)
    names = {category.id: category.name for category in detector.categories}
    seeds = [args.seed + row for row in range(len(scenes))]
    counts: dict[str, list[Counts]] = {}
    for name, drawn in ways(args, pipeline, scenes).items():
        pictures = pipeline.draw(drawn, pipeline.own_sampling, seeds, args.batch_size, args.precision)
        counts[name] = []
        for scene, asked, picture in zip(scenes, drawn, pictures, strict=True):
            image = torch.from_numpy(picture.copy()).permute(2, 0, 1).float().to(device) / 255
            found = in_unit_square(detector([image])[0], picture, args.match_score)
            counts[name].append(count(scene.names, asked, found, names))
        print(f"{name}: recall {share(counts[name], 'found', 'wanted', None).value:.3f}", flush=True)
    return counts


def share(counts: Sequence[Any], part: str, whole: str, weights: np.ndarray | None) -> Interval:
    """The sum of one field of dataclasses over that of another, with its interval; NaN where the latter is 0. weights:
    [R, scenes]."""
    parts, wholes = (np.array([vars(each)[name] for each in counts], dtype=np.float64) for name in (part, whole))
    value = float(parts.sum() / wholes.sum()) if wholes.sum() else float("nan")
    if weights is None:
        return Interval(value, float("nan"), float("nan"))
    totals = weights @ wholes  # [R]
    return interval(value, np.divide(weights @ parts, totals, out=np.full(len(totals), np.nan), where=totals > 0))


def result_row(counts: Sequence[Counts], weights: np.ndarray) -> dict[str, Any]:
    return {
        "recall": asdict(share(counts, "found", "wanted", weights)),
        "placed": asdict(share(counts, "placed", "given", weights)),
        "extra": sum(each.extra for each in counts) / len(counts),
        "num_objects": sum(each.wanted for each in counts),
        "num_boxes": sum(each.given for each in counts),
    }


def format_table(rows: Mapping[str, Mapping[str, Any]], num_scenes: int) -> str:
    """Markdown, in percent."""
    lines = ["| drawn with | recall [95 %] | placed [95 %] | extra / image |", "|---|---|---|---|"]
    for name, row in rows.items():
        cells = [_percent(row[each]) if row["num_boxes"] or each == "recall" else "" for each in ("recall", "placed")]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['extra']:.2f} |")
    objects = next(iter(rows.values()))["num_objects"]
    return "\n".join([*lines, "", f"{objects} objects of {num_scenes} scenes"])


def _percent(value: Mapping[str, float]) -> str:
    return f"{100 * value['value']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def run(args: argparse.Namespace) -> None:
    """Draws, measures, writes and prints. Raises ValueError or FileNotFoundError."""
    counts = measure(args)
    weights = bootstrap_weights(args.num_scenes, args.num_resamples, BOOTSTRAP_SEED)
    rows = {name: result_row(each, weights) for name, each in counts.items()}
    if args.output is not None:
        settings = {name: str(value) for name, value in vars(args).items()}
        content = {"format": FORMAT, "settings": settings, "rows": rows}
        write_text_atomic(args.output, json.dumps(content, indent=2) + "\n")
    print(format_table(rows, args.num_scenes))
