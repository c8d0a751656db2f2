"""Several evaluations in one table: every number with its interval, and how far each differs from the first one's.

An evaluation's folder (scripts/evaluate_layout.py) holds what its numbers were made of, so they are made again here
together with their bootstrap resamples. The same images are drawn for all folders, so that what makes an image hard
for all of them cancels in a difference:

    difference_r = value_r(folder) - value_r(first),   r = 1, ..., R resamples of the images

What the intervals leave out: the spread over seeds and over trainings. Folders whose numbers do not belong together, or
whose files are not those of their results.json, are refused.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.eval.ap import average_precision
from engine.eval.bootstrap import BOOTSTRAP_SEED, Interval, bootstrap_weights, interval
from engine.eval.judge import without_nan
from engine.eval.names import PER_IMAGE_FILE, RESULTS_FILE, detections_file, ground_truth_file
from engine.eval.report.charts import DASH, format_number
from engine.eval.report.markdown import markdown_table
from engine.eval.report.page import RESULTS_FORMAT
from util.read import read_bytes, read_json, short_path, short_repr

Json = dict[str, Any]
COMPARE_FORMAT = "structmar-compare-1"
PRECISIONS = {"AP": ("conditioned", "AP"), "AP50": ("conditioned", "AP50"), "AP full": ("full", "AP")}
LAYOUT = {"mIoU": "mIoU", "SR50": "SR50", "SR50 image": "SR50_image", "extra/image": "extra_rate"}
MEASURES = (*PRECISIONS, *LAYOUT)
UNITS = {"extra/image": (1.0, 2)}  # factor and digits; the others are percent with one digit
SAME = {  # what must be equal, as a reader would call it -> where results.json has it
    "profile": ("profile", "name"),
    "profile's hash": ("profile", "hash"),
    "split": ("dataset", "split"),
    "image ids' hash": ("dataset", "ids_hash"),
    "detector": ("detector", "id"),
    "left out categories": ("detector", "unknown_categories"),
    "number of resamples": ("num_resamples",),
}
TOLERANCE = 1e-6  # between results.json and what its files give


@dataclass(frozen=True)
class Measured:
    """A number and the same number on R resamples of the images: value, samples [R]."""

    value: float
    samples: np.ndarray

    @property
    def interval(self) -> Interval:
        return interval(self.value, self.samples)

    def minus(self, other: Measured) -> Interval:
        """How far it lies above `other`, resample by resample. Raises ValueError if their numbers differ."""
        if self.samples.shape != other.samples.shape:
            raise ValueError(f"resamples differ in number: {self.samples.shape} and {other.samples.shape}")
        return interval(self.value - other.value, self.samples - other.samples)


@dataclass(frozen=True)
class Evaluation:
    """One folder of `scripts.evaluate_layout`. results: results.json; image_ids: N of them, as the evaluation had them.

    ground_truth: by kind. weights: [R, N], how often each image is drawn.
    """

    folder: Path
    results: Json
    ground_truth: Mapping[str, Json]
    image_ids: tuple[int, ...]
    weights: np.ndarray

    def row(self, name: str) -> Json:
        """The row of that name. Raises ValueError naming the file."""
        found: list[Json] = [entry for entry in self.results["rows"] if entry["name"] == name]
        if len(found) != 1:
            raise ValueError(f"{self.folder / RESULTS_FILE}: expected one row {name!r}, found {len(found)}")
        return found[0]

    def names(self, kind: str) -> list[str]:
        return [row["name"] for row in self.results["rows"] if row["kind"] == kind]

    @property
    def model(self) -> str:
        """The name of the only row of a model. Raises ValueError naming the file if there is not exactly one."""
        names = self.names("model")
        if len(names) != 1:
            raise ValueError(f"{self.folder / RESULTS_FILE}: expected one row of a model, found {names}")
        return names[0]

    def seeds(self, row: str) -> Sequence[int | None]:
        """None where nothing was drawn at random."""
        is_bound = self.row(row)["kind"] == "bound"
        return [None] if is_bound or not self.results["seeds"] else list(self.results["seeds"])

    def detections(self, row: str) -> list[list[Json]]:
        """COCO results, for each seed."""
        paths = [detections_file(self.folder, row, seed) for seed in self.seeds(row)]
        return [read_json(path, "detections") for path in paths]


def load_evaluation(folder: Path, num_resamples: int, kinds: Sequence[str] = ("conditioned", "full")) -> Evaluation:
    """Raises FileNotFoundError, or ValueError for results of another format; both name the file."""
    results = read_results(folder)
    ground_truth = {kind: read_json(ground_truth_file(folder, kind), "ground truth") for kind in kinds}
    image_ids = tuple(int(image["id"]) for image in ground_truth[kinds[0]]["images"])
    weights = bootstrap_weights(len(image_ids), num_resamples, BOOTSTRAP_SEED)
    return Evaluation(folder, results, ground_truth, image_ids, weights)


def read_results(folder: Path) -> Json:
    """results.json of a folder. Raises FileNotFoundError or ValueError, both naming it."""
    path = folder / RESULTS_FILE
    results = read_json(path, "evaluation")
    found = results.get("format") if isinstance(results, dict) else None
    if found != RESULTS_FORMAT:
        raise ValueError(f"{short_path(path)} has format {short_repr(found)}, expected {RESULTS_FORMAT!r}")
    checked: Json = results
    return checked


def per_image_sums(evaluation: Evaluation, row: str) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
    """Numerators and denominators [N] of the layout metrics, summed over seeds, from per_image.jsonl."""
    lines = _lines_of(evaluation.folder / PER_IMAGE_FILE, row)
    numbers = [_sums_of_image(lines[image_id]) for image_id in evaluation.image_ids]
    overlap, found, wanted, complete, wanting, extra, pictures = np.array(numbers, dtype=np.float64).T
    return {
        "mIoU": (overlap, wanted),
        "SR50": (found, wanted),
        "SR50_image": (complete, wanting),
        "extra_rate": (extra, pictures),
    }


def ratio(numerator: np.ndarray, denominator: np.ndarray, weights: np.ndarray) -> Measured:
    """sum(numerator) / sum(denominator) over images [N], and over each resample [R, N]; NaN for 0 / 0."""
    if denominator.sum() == 0:
        return Measured(math.nan, np.full(len(weights), np.nan))
    totals = weights @ denominator
    samples = np.divide(weights @ numerator, totals, out=np.full(len(weights), np.nan), where=totals > 0)
    return Measured(float(numerator.sum() / denominator.sum()), samples)


def precision(evaluation: Evaluation, kind: str, runs: Sequence[Sequence[Json]]) -> Mapping[str, Measured]:
    """AP, AP50 and AP75 against that ground truth, means over seeds."""
    settings = evaluation.results["profile"]["settings"]
    low, high = (float(edge) for edge in settings["area_edges_px"])
    truth = evaluation.ground_truth[kind]
    results = [
        average_precision(truth, found, evaluation.image_ids, settings["max_detections"], (low, high)) for found in runs
    ]
    samples = [result.resample(evaluation.weights) for result in results]
    means = {name: float(np.mean([result.values[name] for result in results])) for name in samples[0]}
    return {name: Measured(mean, np.mean([each[name] for each in samples], axis=0)) for name, mean in means.items()}


def measure(evaluation: Evaluation, row: str) -> dict[str, Measured]:
    """MEASURES of the row of that name. Raises ValueError where results.json says other numbers, naming both."""
    runs = evaluation.detections(row)
    by_kind = {kind: precision(evaluation, kind, runs) for kind in evaluation.ground_truth}
    sums = per_image_sums(evaluation, row)
    found = {name: by_kind[kind][key] for name, (kind, key) in PRECISIONS.items()}
    found |= {name: ratio(*sums[key], evaluation.weights) for name, key in LAYOUT.items()}
    places = PRECISIONS | {name: ("layout", key) for name, key in LAYOUT.items()}
    for name, (part, key) in places.items():
        said, value = evaluation.row(row)[part][key]["value"], found[name].value
        said = math.nan if said is None else float(said)
        if abs(said - value) > TOLERANCE or math.isnan(said) != math.isnan(value):
            raise ValueError(
                f"{short_path(evaluation.folder / RESULTS_FILE)}: {name} of row {row!r} is {said:.6f}, but the "
                f"detections beside it give {value:.6f}; evaluate again"
            )
    return found


def compare(folders: Sequence[Path]) -> Json:
    """The comparison as plain values (format COMPARE_FORMAT); the first folder is what the others differ from.

    Raises FileNotFoundError or ValueError, one line naming the folder, the field and both values.
    """
    if len(folders) < 2:
        raise ValueError(f"a comparison needs two folders or more, got {len(folders)}")
    _require_distinct(folders)
    everything = {folder: _checked(folder) for folder in folders}
    first = everything[folders[0]]
    for folder in folders[1:]:
        _require_same(folder, everything[folder], folders[0], first)
    evaluations, measured = [], []
    for folder in folders:
        with _as_written(folder):
            evaluations.append(load_evaluation(folder, first["num_resamples"]))
            measured.append(measure(evaluations[-1], evaluations[-1].model))
    labels = _labels(evaluations)
    bounds = evaluations[0].names("bound")
    with _as_written(folders[0]):
        rows = [_row(name, "bound", folders[0], measure(evaluations[0], name)) for name in bounds]
    for label, evaluation, numbers in zip(labels, evaluations, measured, strict=True):
        rows.append(_row(label, "model", evaluation.folder, numbers))
        rows[-1]["num_seeds"] = len(evaluation.seeds(evaluation.model))
        rows[-1]["is_reward_detector"] = evaluation.results["detector"]["is_reward"]
        if evaluation is not evaluations[0]:
            rows[-1]["difference"] = {name: asdict(numbers[name].minus(measured[0][name])) for name in MEASURES}
    head = {key: first[key] for key in ("profile", "dataset", "detector", "num_resamples")}
    return {"format": COMPARE_FORMAT, **head, "rows": rows}


def format_comparison(comparison: Mapping[str, Any]) -> str:
    """The table as Markdown: bounds, models, and under each but the first what it differs by."""
    profile, dataset, detector = (comparison[key] for key in ("profile", "dataset", "detector"))
    models = [row for row in comparison["rows"] if row["kind"] == "model"]
    body = []
    for row in comparison["rows"]:
        body.append([row["name"], *(_cell(row["metrics"][name], name) for name in MEASURES)])
        if "difference" in row:
            cells = (_cell(row["difference"][name], name, is_signed=True) for name in MEASURES)
            body.append([f"  minus {models[0]['name']}", *cells])
    lines = [
        f"profile {profile['name']} ({profile['hash']}) · {dataset['num_images']} images of {dataset['split']} "
        f"(ids {dataset['ids_hash']}) · detector {detector['arch']} {detector['id'][:8]}",
        "",
        *markdown_table(["", *MEASURES], body),
        "",
        f"In percent, extra/image apart; [95 % interval, {comparison['num_resamples']} bootstrap resamples of the "
        "images, the same ones for all rows].",
    ]
    rewarded = [row["name"] for row in models if row["is_reward_detector"]]
    if rewarded:
        lines.append(f"Trained on this detector's verdict, so no evidence of quality: {', '.join(rewarded)}.")
    return "\n".join(lines)


def as_json(comparison: Json) -> str:
    """Undefined numbers are null."""
    return json.dumps(without_nan(comparison), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _row(name: str, kind: str, folder: Path, numbers: Mapping[str, Measured]) -> Json:
    metrics = {key: asdict(numbers[key].interval) for key in MEASURES}
    return {"name": name, "kind": kind, "folder": str(folder), "metrics": metrics}


def _cell(found: Mapping[str, float], name: str, is_signed: bool = False) -> str:
    factor, digits = UNITS.get(name, (100.0, 1))
    value, low, high = (format_number(found[key], factor, digits) for key in ("value", "low", "high"))
    if is_signed:
        value, low, high = (text if text.startswith(("-", DASH)) else f"+{text}" for text in (value, low, high))
    return value if DASH in (value, low, high) else f"{value} [{low}, {high}]"


def _require_distinct(folders: Sequence[Path]) -> None:
    places: dict[Path, Path] = {}
    for folder in folders:
        if folder.resolve() in places:
            raise ValueError(f"{short_path(places[folder.resolve()])} and {short_path(folder)} are the same folder")
        places[folder.resolve()] = folder


def _checked(folder: Path) -> Json:
    """results.json after a check of all fields that are read here, and of the files that it names by their sha256."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{short_path(folder)} is not a folder of an evaluation")
    results = read_results(folder)
    path = short_path(folder / RESULTS_FILE)
    files = results.get("files")
    if not isinstance(files, dict):
        raise ValueError(f"{path} does not say which files its numbers are of (an earlier version's); evaluate again")
    for name, wanted in files.items():
        found = hashlib.sha256(read_bytes(folder / name, "evaluation's file")).hexdigest()
        if found != wanted:
            raise ValueError(
                f"{short_path(folder / name)} is not what {path} was made of: its sha256 is {found[:12]}, "
                f"not {str(wanted)[:12]}; evaluate again"
            )
    return results


@contextmanager
def _as_written(folder: Path) -> Iterator[None]:
    """What results.json lacks, or has of another kind, becomes a ValueError that names the file."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{short_path(folder / RESULTS_FILE)} is not as it was written ({what})") from error


def _require_same(folder: Path, found: Json, first_folder: Path, first: Json) -> None:
    for name, keys in SAME.items():
        values = [_at(*each, keys) for each in ((first_folder, first), (folder, found))]
        if values[0] != values[1]:
            raise _different(name, first_folder, values[0], folder, values[1])
    for kind in ("conditioned", "full"):
        file = ground_truth_file(Path(), kind).name
        digests = [str(results["files"].get(file))[:12] for results in (first, found)]
        if digests[0] != digests[1]:
            raise _different(f"{file}'s sha256", first_folder, digests[0], folder, digests[1])


def _different(name: str, first_folder: Path, first: Any, folder: Path, found: Any) -> ValueError:
    return ValueError(
        f"{short_path(folder)} cannot stand beside {short_path(first_folder)}: its {name} is {short_repr(found)}, "
        f"there it is {short_repr(first)}"
    )


def _at(folder: Path, results: Json, keys: Sequence[str]) -> Any:
    """A field of results.json. Raises ValueError naming the file and the field that it lacks."""
    value: Any = results
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            raise ValueError(f"{short_path(folder / RESULTS_FILE)} has no {'.'.join(keys)}; evaluate again")
        value = value[key]
    return value


def _labels(evaluations: Sequence[Evaluation]) -> list[str]:
    """The models' names, with their folders where two are called alike."""
    names = [evaluation.model for evaluation in evaluations]
    return [
        name if names.count(name) == 1 else f"{name} ({evaluation.folder})"
        for name, evaluation in zip(names, evaluations, strict=True)
    ]


def _lines_of(path: Path, row: str) -> dict[int, list[Json]]:
    """The row's lines of per_image.jsonl by image id, of all seeds."""
    lines: defaultdict[int, list[Json]] = defaultdict(list)
    for text in read_bytes(path, "numbers by image").decode("utf-8").splitlines():
        line = json.loads(text)
        if line["row"] == row:
            lines[line["image_id"]].append(line)
    return lines


def _sums_of_image(lines: Sequence[Json]) -> tuple[float, ...]:
    """Of one image over its seeds: sum of IoUs, boxes found (IoU at least 0.5), boxes; pictures with all boxes found,
    pictures that want one; extra detections, pictures."""
    wanting = [line for line in lines if line["wanted"]]
    overlap, found = (sum(line[name] * len(line["wanted"]) for line in wanting) for name in ("mIoU", "SR50"))
    num_wanted = sum(len(line["wanted"]) for line in wanting)
    num_complete = sum(line["SR50"] == 1.0 for line in wanting)
    return overlap, found, num_wanted, num_complete, len(wanting), sum(line["extra"] for line in lines), len(lines)
