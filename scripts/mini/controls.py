"""Table and times of scripts/mini/controls.sh; controls_table.py says what they are of."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.data.scenes import scenes_from_dataset
from engine.eval.compare import Evaluation, Measured, compare, load_evaluation, measure, ratio, read_results
from engine.eval.names import REAL
from engine.eval.report.markdown import markdown_table
from engine.sample.pipeline import StructMARPipeline
from models.sampling.config import SamplingConfig
from scripts.mini.families import interval_cell
from scripts.mini.rl_tables import colour_cell
from util.coco import CocoIndex
from util.output import write_text_atomic
from util.plain import from_plain
from util.read import read_json

TIMES_FILE = "times.json"
COLOUR_FILE = "colour.json"
TIMES_FORMAT = "structmar-mini-control-times-1"
MEASURES = ("AP50", "mIoU")
HEADS = (
    "",
    "classes found",
    *MEASURES,
    "mIoU against the first",
    "right colours",
    "seconds an image",
    "times the first",
)


def run_table(args: argparse.Namespace) -> None:
    """Prints and writes the table, and the times where they are not there yet. Raises ValueError or
    FileNotFoundError."""
    tokenizers = {}
    for given in args.models:
        name, _, vae_path = given.partition("=")
        if not vae_path:
            raise ValueError(f"--models takes NAME=VAE, got {given!r}")
        tokenizers[name] = vae_path
    if not (args.runs / TIMES_FILE).is_file():
        measure_times(args, tokenizers)
    text = controls_table(args.runs, list(tokenizers), args.controls)
    if args.output is not None:
        write_text_atomic(args.output, text + "\n")
    print(text)


def sampling_of(folder: Path) -> SamplingConfig:
    """The options that an evaluation's images were drawn with. Raises FileNotFoundError or ValueError naming it."""
    return from_plain(SamplingConfig, read_results(folder)["sampling"], f"{folder}: sampling")


def flags_of(config: SamplingConfig) -> str:
    """The controls as a command line gives them, in backticks."""
    words = []
    for name, value in config.controls.items():
        if value is True:
            words.append(f"--{name}")
        elif isinstance(value, tuple):
            words.append(f"--{name} {' '.join(f'{each:g}' for each in value)}")
        else:
            words.append(f'--{name} "{value}"' if isinstance(value, str) else f"--{name} {value:g}")
    return f"`{' '.join(words)}`" if words else "none"


def measure_times(args: argparse.Namespace, tokenizers: Mapping[str, str]) -> None:
    """Writes the medians."""
    torch.set_num_threads(args.num_threads)
    pipelines = {
        name: StructMARPipeline.from_checkpoint(
            args.weights / f"{name}.safetensors", vae_path, args.clip_path, max_text_tokens=args.max_text_tokens
        )
        for name, vae_path in tokenizers.items()
    }
    configs = {
        (name, control): sampling_of(args.runs / name / control) for name in pipelines for control in args.controls
    }
    index = CocoIndex.load(args.coco_root, "val2017")
    scenes = scenes_from_dataset(index, next(iter(pipelines.values())).model.config.img_size, args.num_images)
    seconds: dict[tuple[str, str], list[float]] = {each: [] for each in configs}
    for _ in range(1 + args.repeats):
        for (name, control), config in configs.items():
            start = time.process_time()
            pipelines[name].draw(scenes, config, range(len(scenes)), len(scenes), args.precision)
            seconds[name, control].append(time.process_time() - start)
    medians = {
        name: {each: statistics.median(seconds[name, each][1:]) / len(scenes) for each in args.controls}
        for name in pipelines
    }
    told = {"num_images": len(scenes), "repeats": args.repeats, "precision": args.precision}
    content = {"format": TIMES_FORMAT, **told, "num_threads": args.num_threads, "seconds_an_image": medians}
    write_text_atomic(args.runs / TIMES_FILE, json.dumps(content, indent=1) + "\n")


def read_times(path: Path) -> dict[str, Any]:
    """What `measure_times` wrote. Raises FileNotFoundError, or ValueError for another format; both name the file."""
    times: dict[str, Any] = read_json(path, "times")
    if times.get("format") != TIMES_FORMAT:
        raise ValueError(f"{path} has format {times.get('format')!r}, expected {TIMES_FORMAT!r}")
    return times


def controls_table(runs: Path, names: Sequence[str], controls: Sequence[str]) -> str:
    """As Markdown, a table for each model. Raises FileNotFoundError, or ValueError naming the folders whose numbers do
    not belong together."""
    times, parts = read_times(runs / TIMES_FILE), []
    for name in names:
        body = model_rows([runs / name / control for control in controls], times["seconds_an_image"][name])
        parts += [f"`{name}`:", "", *markdown_table(HEADS, body), ""]
    results = read_results(runs / names[0] / controls[0])
    profile, dataset = results["profile"], results["dataset"]
    note = (
        f"Profile {profile['name']} ({profile['hash']}), {dataset['num_images']} images of {dataset['split']} (ids "
        f"{dataset['ids_hash']}). In percent; [95 % interval over images], of differences image by image. Classes "
        f"found: of the objects asked for, anywhere in the picture. Seconds: of the processor, medians of "
        f"{times['repeats']} turns, {times['num_images']} images at a time, {times['num_threads']} thread(s), "
        f"{times['precision']}, from captions to pixels."
    )
    return "\n".join([*parts, note])


def classes_found(evaluation: Evaluation, row: str) -> Measured:
    """The share of a layout's objects whose class is seen anywhere in the picture, as often as it is asked for: what
    the caption decides, wherever the boxes are."""
    threshold = evaluation.results["profile"]["settings"]["match_score"]
    places = {image_id: place for place, image_id in enumerate(evaluation.image_ids)}
    wanted: list[Counter[int]] = [Counter() for _ in places]
    for item in evaluation.ground_truth["conditioned"]["annotations"]:
        wanted[places[item["image_id"]]][item["category_id"]] += 1
    found, total = np.zeros(len(places)), np.zeros(len(places))
    for detections in evaluation.detections(row):
        seen: list[Counter[int]] = [Counter() for _ in places]
        for item in detections:
            if item["score"] >= threshold:
                seen[places[item["image_id"]]][item["category_id"]] += 1
        found += [(asked & there).total() for asked, there in zip(wanted, seen, strict=True)]
        total += [asked.total() for asked in wanted]
    return ratio(found, total, evaluation.weights)


def class_cell(evaluation: Evaluation, row: str) -> str:
    return interval_cell(classes_found(evaluation, row).interval, "classes found")


def model_rows(folders: Sequence[Path], seconds: Mapping[str, float]) -> list[list[str]]:
    """The real drawings, then a row for each evaluation of one model, the first of which the others differ from.
    seconds: an image, by the folder's name."""
    if len(folders) > 1:
        compare(folders)  # refuses what does not belong together
    rows, first = [], None
    for folder in folders:
        evaluation = load_evaluation(folder, read_results(folder)["num_resamples"])
        found = measure(evaluation, evaluation.model)
        if first is None:
            first = found
            bound = measure(evaluation, REAL)
            cells = [interval_cell(bound[each].interval, each) for each in MEASURES]
            rows.append(["real drawings", class_cell(evaluation, REAL), *cells, *[""] * 4])
        change = "" if found is first else interval_cell(found["mIoU"].minus(first["mIoU"]), "mIoU", is_signed=True)
        spent, plain = seconds[folder.name], seconds[folders[0].name]
        numbers = [class_cell(evaluation, evaluation.model)]
        numbers += [interval_cell(found[each].interval, each) for each in MEASURES]
        colours = colour_cell(folder / COLOUR_FILE)
        rows.append([flags_of(sampling_of(folder)), *numbers, change, colours, f"{spent:.3f}", f"{spent / plain:.2f}"])
    return rows
