"""Tables and pictures of scripts/mini/stage3_table.py, which says what they are of."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.checkpoint.files import read_identity
from engine.eval.bootstrap import BOOTSTRAP_SEED, bootstrap_weights
from engine.eval.compare import Evaluation, Measured, ratio
from engine.eval.report.markdown import markdown_table
from engine.sample.grid import caption_bands
from models.flops import meta_model, sampling_flops
from models.sampling.config import SamplingConfig
from scripts.mini.colours import COLOUR_FORMAT
from scripts.mini.gallery import CELL, FONT, save_small
from scripts.mini.rl_curves import learning_curves
from scripts.mini.rl_measures import NUM_RESAMPLES, load_evaluation, measure
from scripts.mini.rl_tables import Line, plain, require_same_images, signed, with_interval
from scripts.mini.stage3_table import LABELS, SHOWN
from util.boxes import xywh_to_xyxy
from util.images import Picture, draw_boxes, load_image, make_grid, save_png
from util.names import METRICS_NAME
from util.output import write_text_atomic
from util.plain import from_plain
from util.read import read_json

COLOURS = "colours"
NUM_TEXT = 77  # tokens of a padded caption
LINES = (
    Line("judge", "AP50", "AP50"),
    Line("judge", "mIoU", "mIoU"),
    Line("judge", "SR50", "success"),
    Line("judge", "extra", "extra / image", 1.0, 2),
    Line(COLOURS, COLOURS, "right colours"),
    Line("reward", "AP50", "AP50, reward detector"),
    Line("yolox", "AP50", "AP50, YOLOX"),
)
WEIGHTS_NAME = "weights.safetensors"
Numbers = Mapping[tuple[str, str], Measured]
"""(detector, measure) -> the number."""


def trainings_of(runs: Path, row: str) -> list[str]:
    """Raises FileNotFoundError naming the folder if there are none."""
    folder = runs / "scores" / row
    found = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not found:
        raise FileNotFoundError(f"{folder} has no training that was evaluated")
    return found


def load_row(
    runs: Path, row: str, training: str, detectors: Sequence[str], baseline: Mapping[str, Evaluation], resamples: int
) -> tuple[dict[str, Evaluation], Numbers]:
    """The evaluations of one training by detector, and its numbers. baseline: what they must go with; {} for itself.

    Raises FileNotFoundError or ValueError naming folder, field and both values.
    """
    folder = runs / "scores" / row / training
    found = {detector: load_evaluation(folder / detector, resamples) for detector in detectors}
    numbers: dict[tuple[str, str], Measured] = {(COLOURS, COLOURS): colours(folder / "colour.json", resamples)}
    for detector, evaluation in found.items():
        require_same_images(evaluation, found[detectors[0]])
        require_comparable(evaluation, baseline.get(detector, evaluation))
        numbers |= {(detector, name): value for name, value in measure(evaluation, evaluation.model).items()}
    return found, numbers


def require_comparable(found: Evaluation, first: Evaluation) -> None:
    """Raises ValueError naming the field and both values: sampling may differ from row to row, nothing else."""
    for field in ("profile", "dataset", "detector", "seeds"):
        values = [evaluation.results[field] for evaluation in (first, found)]
        if field == "detector":
            values = [value["id"] for value in values]
        if values[0] != values[1]:
            raise ValueError(f"{field} differs: {values[0]} in {first.folder}, {values[1]} in {found.folder}")


def colours(path: Path, num_resamples: int) -> Measured:
    """Share of right colours where the caption decides. Raises FileNotFoundError, or ValueError naming the file."""
    results = read_json(path, "colours")
    if results.get("format") != COLOUR_FORMAT:
        raise ValueError(f"{path} has format {results.get('format')!r}, expected {COLOUR_FORMAT!r}")
    (row,) = [row for row in results["rows"] if row["kind"] == "model"]
    if "determined_by_image" not in row:
        raise ValueError(f"{path} has no counts for each image: remove it and measure again")
    right, wanted = (np.array(row["determined_by_image"][key], dtype=np.float64) for key in ("right", "wanted"))
    return ratio(right, wanted, bootstrap_weights(len(right), num_resamples, BOOTSTRAP_SEED))


def mean_of(trainings: Sequence[Numbers]) -> dict[tuple[str, str], Measured]:
    """Over trainings, resample by resample."""
    return {
        key: Measured(
            float(np.mean([each[key].value for each in trainings])),
            np.mean([each[key].samples for each in trainings], axis=0),
        )
        for key in trainings[0]
    }


def image_flops(evaluation: Evaluation, weights: Path) -> float:
    """Of one image as it was drawn, without the decoder. Raises FileNotFoundError or ValueError naming the file."""
    identity = read_identity(weights)
    if identity is None:
        raise ValueError(f"{weights} does not say what it was made for")
    sampling = from_plain(SamplingConfig, evaluation.results["sampling"], f"{evaluation.folder}: sampling")
    return sampling_flops(meta_model(identity.config), sampling, NUM_TEXT)


def run_of(row: str) -> str:
    """The run that a row's weights come from."""
    return "few_step" if row.startswith("few_step") else row


def weights_of(runs: Path, row: str, training: str, stage2: Path) -> Path:
    return stage2 if row.startswith("stage2") else runs / "runs" / run_of(row) / training / WEIGHTS_NAME


@dataclass(frozen=True)
class Row:
    """label: of the table. trainings: numbers by training; mean: over them. flops: of an image."""

    label: str
    trainings: Mapping[str, Numbers]
    mean: Numbers
    flops: float


def load_rows(
    runs: Path, rows: Sequence[str], detectors: Sequence[str], stage2: Path, num_resamples: int
) -> tuple[list[Row], Evaluation]:
    """The rows, and an evaluation of the first. Raises FileNotFoundError or ValueError."""
    loaded, baseline = [], dict[str, Evaluation]()
    for row in rows:
        trainings, flops = dict[str, Numbers](), 0.0
        for training in trainings_of(runs, row):
            found, trainings[training] = load_row(runs, row, training, detectors, baseline, num_resamples)
            baseline = baseline or found
            flops = image_flops(found[detectors[0]], weights_of(runs, row, training, stage2))
        loaded.append(Row(LABELS[row], trainings, mean_of(list(trainings.values())), flops))
    return loaded, baseline[detectors[0]]


def tables(
    runs: Path, names: Sequence[str], detectors: Sequence[str], stage2: Path, num_resamples: int = NUM_RESAMPLES
) -> str:
    """All tables and what they are of, as Markdown. Raises FileNotFoundError or ValueError."""
    rows, evaluation = load_rows(runs, names, detectors, stage2, num_resamples)
    lines = [(line, (line.detector, line.measure)) for line in LINES if line.detector in (*detectors, COLOURS)]
    heads, before = [line.head for line, _ in lines], rows[0]
    values = [
        [row.label, *(with_interval(row.mean[key].interval, line) for line, key in lines), f"{row.flops / 1e9:.1f}"]
        for row in rows
    ]
    gains = [[row.label, *(signed(row.mean[key].minus(before.mean[key]), line) for line, key in lines)] for row in rows]
    apart = [
        [f"{row.label}, {training}", *(plain(numbers[key].value, line) for line, key in lines)]
        for row in rows
        for training, numbers in row.trainings.items()
    ]
    parts = [
        markdown_table(["", *heads, "GFLOP / image"], values),
        markdown_table([f"gain over {before.label}", *heads], gains[1:]),
        markdown_table(["each training", *heads], apart),
    ]
    return "\n\n".join(["\n".join(part) for part in parts] + [_legend(evaluation, num_resamples)])


def _legend(evaluation: Evaluation, num_resamples: int) -> str:
    profile, dataset = evaluation.results["profile"], evaluation.results["dataset"]
    seeds = ", ".join(map(str, evaluation.results["seeds"]))
    return (
        f"Profile {profile['name']} ({profile['hash']}), {dataset['num_images']} images of {dataset['split']} (ids "
        f"{dataset['ids_hash']}), seeds {seeds}; by the judge where no detector is named. AP50, mIoU, success rate "
        "(IoU of at least 0.5) and colours (where the caption decides) in percent; means over trainings, [95 % "
        f"interval over layouts], gains paired; {num_resamples} bootstrap resamples. What the reward detector says was "
        "trained for and is no evidence of quality. GFLOP: backbone and head of an image as it was drawn, without the "
        "decoder."
    )


def curves(runs: Path, rows: Sequence[str]) -> Picture:
    """Of the first training of every run that has a reward. Raises FileNotFoundError or ValueError."""
    names = [row for row in rows if row in ("reward_gradient", "grpo", "nft", "best_of")]
    folders = {LABELS[name]: runs / "runs" / name / trainings_of(runs, name)[0] / METRICS_NAME for name in names}
    return learning_curves(folders)


def gallery(runs: Path, rows: Sequence[str], num_shown: int) -> Picture:
    """A column for each row of SHOWN that is there, titled; a line for each of the first layouts, boxes in the first
    column. All pictures of a line are drawn with the same seed. Raises FileNotFoundError or ValueError."""
    columns = []
    shown = [row for row in SHOWN if row in rows]
    for row in shown:
        evaluation = load_evaluation(runs / "scores" / row / trainings_of(runs, row)[0] / "judge", 1)
        columns.append(column_pictures(evaluation, num_shown, has_boxes=row == shown[0]))
    bands = caption_bands([LABELS[row] for row in shown], CELL, FONT)
    top = [np.concatenate([band, column[0]]) for band, column in zip(bands, columns, strict=True)]
    lines = [top, *(list(line) for line in zip(*(column[1:] for column in columns), strict=True))]
    return np.concatenate([make_grid(line, len(line)) for line in lines])


def column_pictures(evaluation: Evaluation, num_shown: int, has_boxes: bool) -> list[Picture]:
    """The first images, drawn with the first seed, CELL pixels wide."""
    truth = evaluation.ground_truth["conditioned"]
    names = {entry["id"]: entry["name"] for entry in truth["categories"]}
    sizes = {image["id"]: (image["width"], image["height"]) for image in truth["images"]}
    folder = evaluation.folder / "images" / f"seed_{evaluation.results['seeds'][0]}"
    pictures = []
    for image_id in evaluation.image_ids[:num_shown]:
        wanted = [entry for entry in truth["annotations"] if entry["image_id"] == image_id and not entry["iscrowd"]]
        wanted = wanted if has_boxes else []
        scale = np.array([*sizes[image_id], *sizes[image_id]], dtype=np.float64)
        boxes_xywh = np.array([entry["bbox"] for entry in wanted], dtype=np.float64).reshape(-1, 4) / scale
        labels = [names[entry["category_id"]] for entry in wanted]
        picture = np.asarray(load_image(folder / f"{image_id:012d}.png"))
        pictures.append(draw_boxes(picture, xywh_to_xyxy(boxes_xywh), labels, CELL))
    return pictures


def run(args: argparse.Namespace) -> None:
    """Prints and writes the tables, draws curves and gallery. Raises ValueError or FileNotFoundError."""
    if args.curves is not None:
        save_png(curves(args.runs, args.rows), args.curves)
    if args.gallery is not None:
        save_small(gallery(args.runs, args.rows, args.num_shown), args.gallery)
    text = tables(args.runs, args.rows, args.detectors, args.stage2)
    if args.output is not None:
        write_text_atomic(args.output, text + "\n")
    print(text)
