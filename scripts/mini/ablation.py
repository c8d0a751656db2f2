"""The table of scripts/mini/ablation_table.py, which says what it is of."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.eval.report.page import RESULTS_FORMAT, Column
from util.output import write_text_atomic

MODEL, NO_LAYOUT, REAL = "model", "no layout", "real images"
VARIANTS: dict[str, tuple[str, str]] = {  # folder -> what the table calls it, and which row counts
    "full": ("full", MODEL),
    "no_rope": ("without 2D RoPE", MODEL),
    "no_bias": ("without the layout bias", MODEL),
    "no_fourier": ("without Fourier features of the boxes", MODEL),
    "no_cross_attention": ("without cross-attention (pooled text only)", MODEL),
    "text_only": ("caption only, no boxes", NO_LAYOUT),
}
COLUMNS = (
    Column("AP50", "conditioned", "AP50", has_interval=True),
    Column("mIoU", "layout", "mIoU", has_interval=True),
    Column("SR50", "layout", "SR50", has_interval=True),
    Column("extra/image", "layout", "extra_rate", has_interval=True, factor=1.0, digits=2),
)
SAME = ("profile", "dataset", "detector", "sampling", "seeds", "num_resamples")


def read_results(path: Path) -> dict[str, Any]:
    """Raises FileNotFoundError, or ValueError for a file of another format; both name the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: bash scripts/mini/ablation.sh makes it")
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if results.get("format") != RESULTS_FORMAT:
        raise ValueError(f"{path} has format {results.get('format')!r}, expected {RESULTS_FORMAT!r}")
    return results


def require_same(path: Path, found: Mapping[str, Any], first_path: Path, first: Mapping[str, Any]) -> None:
    """Raises ValueError naming the field, both files and both values: such rows must not stand in one table."""
    for field in SAME:
        if found[field] != first[field]:
            raise ValueError(f"{field} differs: {first[field]} in {first_path}, {found[field]} in {path}")


def pick_row(results: Mapping[str, Any], wanted: str, path: Path) -> Mapping[str, Any]:
    """The row named `wanted`; MODEL stands for the only one of that kind that has boxes. Raises ValueError."""
    rows = [
        row
        for row in results["rows"]
        if row["name"] == wanted or (wanted == MODEL and row["kind"] == MODEL and row["name"] != NO_LAYOUT)
    ]
    if len(rows) != 1:
        names = [row["name"] for row in results["rows"]]
        raise ValueError(f"{path}: expected one row '{wanted}', found {len(rows)} among {names}")
    found: Mapping[str, Any] = rows[0]
    return found


def format_line(label: str, row: Mapping[str, Any]) -> str:
    cells = [" ".join(filter(None, column.read(row))) for column in COLUMNS]
    return f"| {label} | {' | '.join(cells)} |"


def ablation_table(runs: Path) -> str:
    """runs: a folder with <variant>/evaluation/results.json. Raises FileNotFoundError or ValueError naming the file."""
    paths = {name: runs / name / "evaluation" / "results.json" for name in VARIANTS}
    results = {name: read_results(path) for name, path in paths.items()}
    first = next(iter(VARIANTS))
    lines = [f"| | {' | '.join(column.head for column in COLUMNS)} |", "|---" + "|---:" * len(COLUMNS) + "|"]
    for name, (label, wanted) in VARIANTS.items():
        require_same(paths[name], results[name], paths[first], results[first])
        lines.append(format_line(label, pick_row(results[name], wanted, paths[name])))
    lines.append(format_line(REAL, pick_row(results[first], REAL, paths[first])))
    found = results[first]
    dataset, seeds = found["dataset"], ", ".join(map(str, found["seeds"]))
    lines += [
        "",
        f"Profile {found['profile']['name']} ({found['profile']['hash']}), {dataset['num_images']} images of "
        f"{dataset['split']} (ids {dataset['ids_hash']}), seeds {seeds}. In percent, extra/image apart; "
        f"[95 % interval over images, {found['num_resamples']} bootstrap resamples; one training each].",
    ]
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    """Prints and writes the table. Raises ValueError or FileNotFoundError."""
    table = ablation_table(args.runs)
    if args.output is not None:
        write_text_atomic(args.output, table + "\n")
    print(table)
