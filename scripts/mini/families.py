"""Times and table of scripts/mini/families.sh; families_time.py and families_table.py say what they are of."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.data.scenes import Scene, scenes_from_dataset
from engine.eval.bootstrap import Interval
from engine.eval.compare import UNITS, Evaluation, compare, load_evaluation, measure, read_results
from engine.eval.names import REAL
from engine.eval.report.markdown import markdown_table
from engine.sample.pipeline import StructMARPipeline
from models.sampling.config import SamplingConfig
from scripts.mini.families_table import DETECTORS, LABELS, TIMES_FILE
from scripts.mini.rl_tables import colour_cell
from util.coco import CocoIndex
from util.names import LAST_NAME
from util.output import write_text_atomic
from util.plain import from_plain
from util.read import read_json

TIMES_FORMAT = "structmar-mini-times-1"
COLOUR_FILE = "colour.json"
MEASURES = {"judge": ("AP50", "mIoU", "extra/image"), "yolox": ("AP50",)}  # by detector


def evaluation_folder(runs: Path, name: str, iterations: int, detector: str) -> Path:
    return runs / name / str(iterations) / detector


def evaluated_sampling(runs: Path, name: str, iterations: int) -> SamplingConfig:
    """The options that a model's images were drawn with. Raises FileNotFoundError or ValueError naming the file."""
    folder = evaluation_folder(runs, name, iterations, "judge")
    return from_plain(SamplingConfig, read_results(folder)["sampling"], f"{folder}: sampling")


def run_times(args: argparse.Namespace) -> None:
    """Writes the medians. Raises ValueError or FileNotFoundError."""
    torch.set_num_threads(args.num_threads)
    pipelines: dict[str, StructMARPipeline] = {}
    for given in args.models:
        name, _, vae_path = given.partition("=")
        if not vae_path:
            raise ValueError(f"--models takes NAME=VAE, got {given!r}")
        pipelines[name] = StructMARPipeline.from_checkpoint(
            args.runs / name / LAST_NAME, vae_path, args.clip_path, max_text_tokens=args.max_text_tokens
        )
    settings = [(name, count) for name in pipelines for count in args.iterations]
    configs = {each: evaluated_sampling(args.runs, *each) for each in settings}
    index = CocoIndex.load(args.coco_root, "val2017")
    scenes = scenes_from_dataset(index, next(iter(pipelines.values())).model.config.img_size, args.num_images)
    seconds: dict[tuple[str, int], list[float]] = {each: [] for each in settings}
    for _ in range(1 + args.repeats):
        for name, count in settings:
            seconds[name, count].append(_seconds(pipelines[name], scenes, configs[name, count], args.precision))
    medians = {
        name: {str(count): statistics.median(seconds[name, count][1:]) / len(scenes) for count in args.iterations}
        for name in pipelines
    }
    told = {"num_images": len(scenes), "repeats": args.repeats, "precision": args.precision}
    content = {"format": TIMES_FORMAT, **told, "num_threads": args.num_threads, "seconds_an_image": medians}
    write_text_atomic(args.output, json.dumps(content, indent=1) + "\n")


def _seconds(pipeline: StructMARPipeline, scenes: Sequence[Scene], config: SamplingConfig, precision: str) -> float:
    start = time.perf_counter()
    pipeline.draw(scenes, config, range(len(scenes)), batch_size=len(scenes), precision=precision)
    return time.perf_counter() - start


def run_table(args: argparse.Namespace) -> None:
    """Prints and writes the table. Raises ValueError or FileNotFoundError."""
    text = families_table(args.runs, args.names, args.iterations, args.detectors)
    if args.output is not None:
        write_text_atomic(args.output, text + "\n")
    print(text)


def families_table(runs: Path, names: Sequence[str], iterations: Sequence[int], detectors: Sequence[str]) -> str:
    """As Markdown. Raises FileNotFoundError, or ValueError naming the folders whose numbers do not belong together."""
    settings = [(name, count) for name in names for count in iterations]
    times = read_times(runs / TIMES_FILE)
    models = {each: _judged(runs, *each, detectors) for each in settings}
    for detector in detectors:
        compare([found[detector].folder for found in models.values()])  # refuses what does not belong together
    body = []
    for label, row, found in _bounds(models):
        body.append([label, *_cells(found, row), "", ""])
    for (name, count), found in models.items():
        colours = colour_cell(runs / name / str(count) / COLOUR_FILE)
        seconds = times["seconds_an_image"][name][str(count)]
        body.append([f"{LABELS[name]}, {count}", *_cells(found), colours, f"{seconds:.3f}"])
    first = models[settings[0]]
    results = first[detectors[0]].results
    heads = [f"{name}, {DETECTORS[detector]}" for detector in detectors for name in MEASURES[detector]]
    lines = markdown_table(["", *heads, *_distances(first), "right colours", "seconds an image"], body)
    profile, dataset = results["profile"], results["dataset"]
    return "\n".join(
        [
            *lines,
            "",
            f"Profile {profile['name']} ({profile['hash']}), {dataset['num_images']} images of {dataset['split']} (ids "
            f"{dataset['ids_hash']}). In percent, extra/image and distances apart; [95 % interval over images]; one "
            f"training each. Seconds: medians of {times['repeats']} turns, {times['num_images']} images at a time, "
            f"{times['num_threads']} thread(s), {times['precision']}, from captions to pixels.",
        ]
    )


def read_times(path: Path) -> dict[str, Any]:
    """What `run_times` wrote. Raises FileNotFoundError, or ValueError for another format; both name the file."""
    times: dict[str, Any] = read_json(path, "times")
    if times.get("format") != TIMES_FORMAT:
        raise ValueError(f"{path} has format {times.get('format')!r}, expected {TIMES_FORMAT!r}")
    return times


def _judged(runs: Path, name: str, iterations: int, detectors: Sequence[str]) -> dict[str, Evaluation]:
    folders = {detector: evaluation_folder(runs, name, iterations, detector) for detector in detectors}
    return {
        detector: load_evaluation(folder, read_results(folder)["num_resamples"]) for detector, folder in folders.items()
    }


def _bounds(
    models: Mapping[tuple[str, int], Mapping[str, Evaluation]],
) -> list[tuple[str, str, Mapping[str, Evaluation]]]:
    """Label, row and evaluations of the real drawings, once, and of what each tokenizer leaves of them."""
    found: dict[str, tuple[str, str, Mapping[str, Evaluation]]] = {}
    for (name, _), evaluations in models.items():
        for row in next(iter(evaluations.values())).names("bound"):
            label = row if row == REAL else f"{row}, {LABELS[name].partition(',')[0]}"
            found.setdefault(label, (label, row, evaluations))
    return list(found.values())


def _cells(evaluations: Mapping[str, Evaluation], row: str | None = None) -> list[str]:
    """Of the row of that name, or of the model's."""
    cells = []
    for detector, evaluation in evaluations.items():
        numbers = measure(evaluation, row or evaluation.model)
        cells += [interval_cell(numbers[name].interval, name) for name in MEASURES[detector]]
    judged = next(iter(evaluations.values()))
    quality = judged.row(row or judged.model)["quality"]
    return [*cells, *(f"{quality[name]:.3f}" if name in quality else "" for name in _distances(evaluations))]


def _distances(evaluations: Mapping[str, Evaluation]) -> list[str]:
    """Names of the distances between features, of the first detector's evaluation."""
    judged = next(iter(evaluations.values()))
    return list(judged.row(judged.model)["quality"])


def interval_cell(found: Interval, measure_name: str, is_signed: bool = False) -> str:
    """A number and its 95 % interval, in the units of that measure. is_signed: of a difference."""
    factor, digits = UNITS.get(measure_name, (100.0, 1))
    sign = "+" if is_signed else ""
    value, low, high = (f"{factor * each:{sign}.{digits}f}" for each in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]"
