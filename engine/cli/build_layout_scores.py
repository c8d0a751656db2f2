"""From parsed arguments to scores of layouts (scripts/score_layouts.py)."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.data.coco import make_layout
from engine.data.layout_formats import FileFormat
from engine.data.scenes import KnownLabels, Scene, read_layout_file, text_scene
from engine.eval.layout_scores import LayoutScores, score_layouts
from engine.plan.data import held_out
from engine.plan.propose import LayoutPlanner, layout_generators
from models.frozen.encoder import load_text_encoder
from util.boxes import plan_center_crop
from util.buckets import read_size
from util.coco import BoxFilters, CocoIndex
from util.distributed import init_distributed
from util.logging import setup_logging
from util.output import write_text_atomic
from util.read import short_path, short_repr
from util.rng import generator
from util.types import Layout

logger = logging.getLogger(__name__)

DEFAULT_MAX_OBJECTS = 16
FORMAT = "structmar-layout-scores-1"


@dataclass(frozen=True)
class Compared:
    """Layouts of the same captions, one to one."""

    proposed: list[Layout]
    real: list[Layout]


def score(args: argparse.Namespace) -> str:
    """Writes --output and gives the table. Raises ValueError or FileNotFoundError, naming what does not fit."""
    setup_logging()
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    device = init_distributed(args.device).device
    planner = LayoutPlanner.load(args.planner_path, device) if args.planner_path else None
    placed = DEFAULT_MAX_OBJECTS if planner is None else planner.identity.config.max_objects
    max_objects = args.max_objects or placed
    filters = BoxFilters(args.min_area, args.min_visibility, max_objects, drop_empty=True)
    index = held_out(CocoIndex.load(args.coco_root, args.coco_split, filters, args.img_size), args.held_out_every)
    if planner is None:
        compared, name = from_file(args, index, max_objects), "file"
    else:
        compared, name = from_planner(args, index, planner, device), "planner"
    rows = table_rows(name, compared)
    if args.output is not None:
        content = {
            "format": FORMAT,
            "split": index.split,
            "num_layouts": len(compared.real),
            "settings": settings(args),
        }
        scored = {row: scores.to_dict() for row, scores in rows.items()}
        write_text_atomic(Path(args.output), json.dumps({**content, "rows": scored}, indent=2) + "\n")
    return format_table(rows, len(compared.real))


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name not in ("output", "debug", "num_threads")}


def real_layouts(args: argparse.Namespace, index: CocoIndex) -> list[Layout]:
    crops = [plan_center_crop(image.width, image.height, args.img_size) for image in index.images]
    return [make_layout(image, crop, False, index.filters) for image, crop in zip(index.images, crops, strict=True)]


def from_planner(args: argparse.Namespace, index: CocoIndex, planner: LayoutPlanner, device: torch.device) -> Compared:
    """One layout for the first caption of each image, drawn by --seed and the image's id."""
    encoder = load_text_encoder(args.clip_path, device, args.max_text_tokens)
    known = KnownLabels(index.categories, planner.identity.config.max_objects)
    planner.require_fitting(known, encoder.id)
    images = index.images[: args.max_images]
    scenes = [text_scene(image.captions[0]) for image in images]
    draws = layout_generators([generator("score", args.seed, image.id) for image in images])
    planned = planner.scenes(scenes, known, encoder, draws, args.planner_temperature)
    return Compared([scene.layout for scene in planned], real_layouts(args, index)[: args.max_images])


def from_file(args: argparse.Namespace, index: CocoIndex, max_objects: int) -> Compared:
    """The entries of --layout, each beside the image whose caption it has. Raises ValueError naming the file and the
    prompt that no image has."""
    said = FileFormat(args.layout_format, None if args.layout_canvas is None else read_size(args.layout_canvas))
    scenes = read_layout_file(args.layout, KnownLabels(index.categories, max_objects), None, said)[: args.max_images]
    rows = {key(text): row for row in reversed(range(len(index))) for text in index.images[row].captions}
    real = real_layouts(args, index)
    return Compared([scene.layout for scene in scenes], [real[_row(scene, rows, args.layout)] for scene in scenes])


def key(caption: str) -> str:
    """Captions are the same where only spaces, capitals and the last full stop differ."""
    return " ".join(caption.lower().split()).rstrip(".")


def _row(scene: Scene, rows: dict[str, int], path: str) -> int:
    row = rows.get(key(scene.prompt))
    if row is None:
        raise ValueError(
            f"layout file {short_path(path)}: the prompt {short_repr(scene.prompt)} is no caption of an image that is "
            f"scored ({len(rows)} captions)"
        )
    return row


def table_rows(name: str, compared: Compared) -> dict[str, LayoutScores]:
    """By name. Other captions: each layout against the next image's real one."""
    proposed, real = compared.proposed, compared.real
    return {
        name: score_layouts(proposed, real),
        f"{name}, other captions": score_layouts(_shifted(proposed), real),
        "real, other captions": score_layouts(_shifted(real), real),
        "real": score_layouts(real, real),
    }


def _shifted(layouts: Sequence[Layout]) -> list[Layout]:
    return [*layouts[1:], layouts[0]]


def format_table(rows: dict[str, LayoutScores], num_layouts: int) -> str:
    """Markdown."""
    head = "| layouts | class F1 | right count | mIoU | overlap | alignment | layout FD |"
    lines = [head, "|---" * 7 + "|"]
    for name, scores in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in scores.to_dict().values()) + " |")
    return "\n".join([*lines, "", f"{num_layouts} layouts"])
