"""The measurement of scripts/mini/drawing_accuracy.py, which says what it does."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from engine.cli.build_mars_sample import open_pipeline
from engine.data.scenes import text_scene
from engine.eval.bootstrap import BOOTSTRAP_SEED, bootstrap_weights
from engine.sample.generate import batches
from engine.sample.mars import MarsPipeline
from engine.sample.pipeline import StructMARPipeline
from models.frozen.detections import Detections
from models.frozen.faster_rcnn import load_detector
from models.mars.sampling import DrawOptions
from scripts.mini.colours import NONE, box_weights, load_colour_set, name_colour, to_lab
from scripts.mini.described import next_one, parameters_of
from scripts.mini.drawing import CLASS_BY_ID
from scripts.mini.kinds import Kind, Kinds, SceneKinds, format_rows, load_scene_kinds, result_row, tally
from scripts.mini.planned import in_unit_square
from util.images import Picture, center_crop, load_image, make_grid, save_png
from util.output import write_text_atomic

FORMAT = "structmar-mini-drawings-1"
REAL, THROUGH = "real drawings", "real drawings through the tokenizer"
STRUCTMAR = "StructMAR, English captions alone"
CONTROL = "MARS, English, the next picture"
NUM_SHOWN = 8


@dataclass(frozen=True)
class Judge:
    """What it sees: finds by class, with a colour where the class has several."""

    detector: Callable[[list[torch.Tensor]], list[Detections]]
    coverage: Mapping[int, np.ndarray]
    match_score: float
    device: torch.device

    def kinds(self, picture: Picture) -> Kinds:
        image = torch.from_numpy(picture.copy()).permute(2, 0, 1).float().to(self.device) / 255
        found = in_unit_square(self.detector([image])[0], picture, self.match_score)
        lab = to_lab(picture.astype(np.float32) / 255)
        seen: Kinds = Counter()
        for category, box in zip(found.category_ids.tolist(), found.boxes_px.tolist(), strict=True):
            seen[Kind(CLASS_BY_ID[category].name, self._colour(lab, category, box))] += 1
        return seen

    def _colour(self, lab: np.ndarray, category: int, box: Sequence[float]) -> str | None:
        """Of a find, box as fractions; None for classes of one colour, as in scenes."""
        if category not in self.coverage:
            return None
        height, width = lab.shape[:2]
        x0, y0, x1, y1 = (round(value * side) for value, side in zip(box, (width, height) * 2, strict=True))
        x, y = min(max(x0, 0), width - 1), min(max(y0, 0), height - 1)
        place = (x, y, max(min(x1, width) - x, 1), max(min(y1, height) - y, 1))
        patch = lab[y : y + place[3], x : x + place[2]]
        named = name_colour(patch, box_weights(self.coverage[category], place), CLASS_BY_ID[category].colours)
        return None if named == NONE else named


def load_judge(args: argparse.Namespace, device: torch.device) -> Judge:
    """Raises ValueError naming the detector if it knows other classes than the mini world's."""
    detector = load_detector(args.detector, device)
    unknown = [category.name for category in detector.categories if category.id not in CLASS_BY_ID]
    if unknown:
        raise ValueError(f"detector {args.detector} knows {unknown[0]}, which the mini world does not draw")
    return Judge(detector, load_colour_set(args.coco_root, args.split).coverage, args.match_score, device)


@dataclass(frozen=True)
class Drawn:
    """One row: a picture for each scene, and how long one took where it was drawn."""

    pictures: Sequence[Picture]
    seconds: float | None = None


def timed(draw: Callable[[], Sequence[Picture]]) -> Drawn:
    began = time.perf_counter()
    pictures = draw()
    return Drawn(pictures, (time.perf_counter() - began) / len(pictures))


def draw_rows(args: argparse.Namespace, scenes: Sequence[SceneKinds], pipeline: MarsPipeline) -> dict[str, Drawn]:
    """By the row's name."""
    real = [center_crop(load_image(scene.path), pipeline.size[0]) for scene in scenes]
    parts = [pipeline.codes_of(real[rows]) for rows in batches(len(real), args.batch_size)]  # [B, h, w] each
    rows = {REAL: Drawn(real), THROUGH: Drawn([each for codes in parts for each in pipeline.pictures_of(codes)])}
    options = DrawOptions(args.cfg, args.temperature, args.top_k)
    seeds = [args.seed + row for row in range(len(scenes))]
    for language in scenes[0].captions:
        prompts = [scene.captions[language][0] for scene in scenes]
        print(f"drawing from {language}", flush=True)
        drawn = timed(lambda p=prompts: pipeline.draw(p, seeds, options, batch_size=args.batch_size))  # type: ignore[misc]
        rows[f"MARS, {language}"] = drawn
    rows[CONTROL] = Drawn(next_one(rows["MARS, English"].pictures))
    return rows


def draw_structmar(
    args: argparse.Namespace, scenes: Sequence[SceneKinds], device: torch.device
) -> tuple[Drawn, dict[str, int]]:
    """The English captions without boxes, by the options that the weights name; and how many parameters it has."""
    pipe = StructMARPipeline.from_checkpoint(args.structmar, args.structmar_vae, args.structmar_text, device)
    asked = [text_scene(scene.captions["English"][0]) for scene in scenes]
    seeds = [args.seed + row for row in range(len(scenes))]
    print("drawing by StructMAR", flush=True)
    drawn = timed(lambda: pipe.draw(asked, pipe.own_sampling, seeds, args.batch_size, args.precision))
    total = sum(each.numel() for each in pipe.model.parameters())
    return drawn, {"trained": total, "frozen": sum(each.numel() for each in pipe.caption_encoder.model.parameters())}


def save_rows(rows: Mapping[str, Drawn], path: Path) -> None:
    """The first pictures of every row, one row below the other, twice as large."""
    shown = [picture for row in rows.values() for picture in row.pictures[:NUM_SHOWN]]
    size = shown[0].shape[1] * 2, shown[0].shape[0] * 2
    large = [np.asarray(Image.fromarray(each).resize(size, Image.Resampling.NEAREST)) for each in shown]
    save_png(make_grid(large, min(NUM_SHOWN, len(rows[REAL].pictures))), path, {})


def format_results(rows: Mapping[str, Mapping[str, Any]], num_scenes: int) -> str:
    """A Markdown table, in percent."""
    head, rule, *lines = format_rows("drawn", rows)
    taken = [row["seconds_an_image"] for row in rows.values()]
    cells = ["" if seconds is None else f"{seconds:.2f}" for seconds in taken]
    lines = [f"{line} {cell} |" for line, cell in zip(lines, cells, strict=True)]
    return "\n".join([f"{head} seconds / image |", f"{rule}---|", *lines, "", f"{num_scenes} scenes"])


def run(args: argparse.Namespace) -> None:
    """Draws, measures, writes and prints. Raises ValueError or FileNotFoundError."""
    scenes = load_scene_kinds(args.coco_root, args.split, args.num_scenes)
    pipeline = open_pipeline(args)
    device = pipeline.parts.model.device
    judge = load_judge(args, device)
    drawn = draw_rows(args, scenes, pipeline)
    parameters = {"MARS": parameters_of(pipeline.parts.model)}
    if args.structmar is not None:
        drawn[STRUCTMAR], parameters["StructMAR"] = draw_structmar(args, scenes, device)
    weights = bootstrap_weights(len(scenes), args.num_resamples, BOOTSTRAP_SEED)
    rows: dict[str, dict[str, Any]] = {}
    for name, each in drawn.items():
        pairs = zip(scenes, each.pictures, strict=True)
        tallies = [tally(scene.kinds, judge.kinds(picture)) for scene, picture in pairs]
        rows[name] = result_row(tallies, weights) | {"seconds_an_image": each.seconds}
    if args.grid is not None:
        save_rows(drawn, args.grid)
    if args.output is not None:
        settings = {name: str(value) for name, value in vars(args).items()}
        content = {"format": FORMAT, "settings": settings, "num_scenes": len(scenes), "rows": rows}
        content |= {"parameters": parameters, "weights": pipeline.describe_weights()}
        write_text_atomic(args.output, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    print(format_results(rows, len(scenes)))
