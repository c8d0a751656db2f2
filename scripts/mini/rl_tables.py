"""The tables of scripts/mini/rl_table.py, which says what they are of."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.eval.bootstrap import Interval
from engine.eval.compare import Evaluation, Measured
from scripts.mini.colours import COLOUR_FORMAT
from scripts.mini.rl_curves import learning_curves
from scripts.mini.rl_measures import NUM_RESAMPLES, load_evaluation, measure
from scripts.mini.rl_table import DETECTORS, JUDGE, LABELS, REWARD, YOLOX
from util.images import save_png
from util.names import METRICS_NAME
from util.output import write_text_atomic
from util.read import read_json

SAMPLINGS = {
    "rollout": "Sampled without guidance (as all but the guided rollouts)",
    "guided": "Sampled with guidance (configs/mini_eval.yaml)",
}


@dataclass(frozen=True)
class Line:
    """detector: who judges. measure: one of rl_measures.MEASURES. head: its name. factor: 100 for percent."""

    detector: str
    measure: str
    head: str
    factor: float = 100.0
    digits: int = 1


LINES = (
    Line(REWARD, "reward", "mean reward", 1.0, 3),
    Line(REWARD, "AP50", "AP50"),
    Line(REWARD, "mIoU", "mIoU"),
    Line(JUDGE, "reward", "mean reward", 1.0, 3),
    Line(JUDGE, "AP50", "AP50"),
    Line(JUDGE, "mIoU", "mIoU"),
    Line(JUDGE, "SR50", "success rate"),
    Line(JUDGE, "extra", "extra objects an image", 1.0, 2),
    Line(YOLOX, "AP50", "AP50"),
    Line(YOLOX, "SR50", "success rate"),
)


def plain(value: float, line: Line) -> str:
    return f"{line.factor * value:.{line.digits}f}"


def with_interval(found: Interval, line: Line) -> str:
    return f"{plain(found.value, line)} [{plain(found.low, line)}, {plain(found.high, line)}]"


def signed(found: Interval, line: Line) -> str:
    value, low, high = (f"{line.factor * number:+.{line.digits}f}" for number in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]"


def gain_cell(found: Measured, baseline: Measured, line: Line) -> str:
    return f"{with_interval(found.interval, line)}, {signed(found.minus(baseline), line)}"


def require_same(found: Evaluation, first: Evaluation) -> None:
    """Raises ValueError naming the field, both folders and both values: such rows must not stand in one table."""
    for field in ("profile", "dataset", "detector id", "sampling", "seeds"):
        values = [_field(evaluation, field) for evaluation in (first, found)]
        if values[0] != values[1]:
            raise ValueError(
                f"{field} differs: {values[0]} in {first.folder}, {values[1]} in {found.folder}; "
                "remove the folder that is not wanted"
            )


def require_same_images(found: Evaluation, first: Evaluation) -> None:
    """Raises ValueError if two detectors have not judged pictures of the same weights."""
    one, other = (each.results["source"].get("weights_sha256") for each in (first, found))
    if one != other:
        raise ValueError(f"weights_sha256 differs: {one} in {first.folder}, {other} in {found.folder}")


def _field(evaluation: Evaluation, field: str) -> Any:
    if field == "detector id":
        return evaluation.results["detector"]["id"]
    return evaluation.results[field]


def colour_cell(path: Path) -> str:
    """Share of right colours where the caption decides, in percent with its own interval. Raises ValueError."""
    results = read_json(path, "colours")
    if results.get("format") != COLOUR_FORMAT:
        raise ValueError(f"{path} has format {results.get('format')!r}, expected {COLOUR_FORMAT!r}")
    (row,) = [row for row in results["rows"] if row["kind"] == "model"]
    value, low, high = (100 * row["accuracy_determined"][key] for key in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def sampling_table(
    runs: Path, names: Sequence[str], sampling: str, detectors: Sequence[str], num_resamples: int = NUM_RESAMPLES
) -> str:
    """The Markdown table of one sampling; names[0] is the baseline. Raises FileNotFoundError or ValueError."""
    evaluations = _load(runs, names, sampling, detectors, num_resamples)
    measured = {key: measure(evaluation, evaluation.model) for key, evaluation in evaluations.items()}
    bounds = {
        (row, detector): measure(evaluations[names[0], detector], row)
        for row in evaluations[names[0], detectors[0]].names("bound")
        for detector in detectors
    }
    bound_names = list(dict.fromkeys(row for row, _ in bounds))
    lines = [
        f"| | {' | '.join([*(LABELS[name] for name in names), *bound_names])} |",
        "|---" + "|---:" * (len(names) + len(bound_names)) + "|",
    ]
    for line in (each for each in LINES if each.detector in detectors):
        before, *others = (measured[name, line.detector][line.measure] for name in names)
        cells = [with_interval(before.interval, line), *(gain_cell(found, before, line) for found in others)]
        cells += [plain(bounds[row, line.detector][line.measure].value, line) for row in bound_names]
        lines.append(f"| {line.head}, {DETECTORS[line.detector]} | {' | '.join(cells)} |")
    colours = [colour_cell(runs / name / sampling / "colour.json") for name in names]
    lines.append(f"| right colours | {' | '.join([*colours, *[''] * len(bound_names)])} |")
    return "\n".join(lines)


def _load(
    runs: Path, names: Sequence[str], sampling: str, detectors: Sequence[str], num_resamples: int
) -> dict[tuple[str, str], Evaluation]:
    """By name and detector: of the same images, drawn alike. Raises FileNotFoundError or ValueError."""
    evaluations = {
        (name, detector): load_evaluation(runs / name / sampling / detector, num_resamples)
        for name in names
        for detector in detectors
    }
    for (name, detector), evaluation in evaluations.items():
        require_same(evaluation, evaluations[names[0], detector])
        require_same_images(evaluation, evaluations[name, detectors[0]])
    return evaluations


def comparison(runs: Path, names: Sequence[str], detectors: Sequence[str], num_resamples: int = NUM_RESAMPLES) -> str:
    """Both tables and what they are of, as Markdown. Raises FileNotFoundError or ValueError naming the file."""
    parts = []
    for sampling, title in SAMPLINGS.items():
        parts.append(f"{title}:\n\n{sampling_table(runs, names, sampling, detectors, num_resamples)}")
    results = load_evaluation(runs / names[0] / next(iter(SAMPLINGS)) / detectors[0], num_resamples).results
    profile, dataset, seeds = results["profile"], results["dataset"], ", ".join(map(str, results["seeds"]))
    parts.append(
        f"Profile {profile['name']} ({profile['hash']}), {dataset['num_images']} images of {dataset['split']} (ids "
        f"{dataset['ids_hash']}), seeds {seeds}. Reward: engine/rl/rewards.py with the default weights; AP50, mIoU, "
        "success rate (IoU of at least 0.5) and colours (where the caption decides) in percent. [95 % interval over "
        f"layouts], then the gain [95 %, paired over layouts]; {num_resamples} bootstrap resamples, one training each. "
        "What the reward detector says was trained for and is no evidence of quality; the judge is another "
        "architecture, trained on the same scenes."
    )
    return "\n\n".join(parts)


def run(args: argparse.Namespace) -> None:
    """Prints and writes the tables, draws the curves. Raises ValueError or FileNotFoundError."""
    if args.curves is not None:
        runs = {LABELS[name]: args.runs / name / METRICS_NAME for name in args.names[1:]}
        save_png(learning_curves(runs), args.curves)
    text = comparison(args.runs, args.names, args.detectors)
    if args.output is not None:
        write_text_atomic(args.output, text + "\n")
    print(text)
