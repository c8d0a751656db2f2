"""The table that scripts/mini/phrases_table.py says what it is of."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.eval.bootstrap import Interval
from engine.eval.compare import compare, load_evaluation, measure, read_results
from engine.eval.report.markdown import markdown_table
from scripts.mini.colours import COLOUR_FORMAT
from scripts.mini.phrases_table import WAYS
from util.output import write_text_atomic
from util.read import read_json

COLOUR_FILE = "colour.json"
COLOURS = {"accuracy": "right colours", "accuracy_several": "of one class in several colours"}


def run(args: argparse.Namespace) -> None:
    """Prints and writes the table. Raises ValueError or FileNotFoundError."""
    text = phrases_table(args.runs, args.ways)
    if args.output is not None:
        write_text_atomic(args.output, text + "\n")
    print(text)


def phrases_table(runs: Path, ways: Sequence[str]) -> str:
    """As Markdown: a line for each way, the real drawings last. Raises FileNotFoundError, or ValueError naming the
    folders whose numbers do not belong together."""
    found = {way: load_evaluation(runs / way, read_results(runs / way)["num_resamples"]) for way in ways}
    compare([runs / way for way in ways])  # refuses what does not belong together
    body = []
    for way, evaluation in found.items():
        cell = _cell(measure(evaluation, evaluation.model)["AP50"].interval)
        body.append([WAYS[way], cell, *_colour_cells(runs / way / COLOUR_FILE, "model")])
    body.append(["real drawings", "", *_colour_cells(runs / ways[0] / COLOUR_FILE, "bound")])
    colours: dict[str, Any] = read_json(runs / ways[0] / COLOUR_FILE, "colours")
    return "\n".join(
        [
            *markdown_table(["", "AP50", *COLOURS.values()], body),
            "",
            f"{colours['num_images']} held-out scenes, {colours['num_objects']} objects with a colour, "
            f"{colours['num_objects'] - colours['num_determined']} of them beside another colour of their class; "
            "one seed; [95 % interval over images].",
        ]
    )


def _colour_cells(path: Path, kind: str) -> list[str]:
    """Of the row of that kind. Raises FileNotFoundError, or ValueError for another format; both name the file."""
    content: dict[str, Any] = read_json(path, "colours")
    if content.get("format") != COLOUR_FORMAT:
        raise ValueError(f"{path} has format {content.get('format')!r}, expected {COLOUR_FORMAT!r}")
    (row,) = (each for each in content["rows"] if each["kind"] == kind)
    return [_cell(Interval(**row[name])) for name in COLOURS]


def _cell(found: Interval) -> str:
    value, low, high = (f"{100 * each:.1f}" for each in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]"
