"""The tables of scripts/mini/mars_table.py, which says what they are of."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from scripts.mini import described, drawn, unchanged
from util.output import write_text_atomic
from util.read import read_json, short_repr


def read_results(path: Path, wanted: str, command: str) -> dict[str, Any]:
    """Raises FileNotFoundError, or ValueError naming the file and the command that writes such ones."""
    content = read_json(path, "results")
    found = content.get("format") if isinstance(content, dict) else None
    if found != wanted:
        raise ValueError(f"{path} has format {short_repr(found)}, not {wanted!r}: make it with python -m {command}")
    return dict(content)


def format_parameters(parameters: dict[str, dict[str, int]]) -> list[str]:
    lines = ["| model | parameters that train | frozen beside them |", "|---|---|---|"]
    return lines + [f"| {name} | {each['trained']:,} | {each['frozen']:,} |" for name, each in parameters.items()]


def run(args: argparse.Namespace) -> None:
    """Prints and writes. Raises ValueError or FileNotFoundError."""
    captions = read_results(args.captions, described.FORMAT, "scripts.mini.caption_accuracy")
    drawings = read_results(args.drawings, drawn.FORMAT, "scripts.mini.drawing_accuracy")
    text = read_results(args.text, unchanged.FORMAT, "scripts.mini.text_equality")
    parts = [
        described.format_results(captions, captions["num_scenes"]),
        f"{captions['seconds_a_caption']:.2f} seconds a caption",
        drawn.format_results(drawings["rows"], drawings["num_scenes"]),
        "\n".join(format_parameters(drawings["parameters"])),
        unchanged.format_results(text),
    ]
    table = "\n\n".join(parts)
    if args.output is not None:
        write_text_atomic(args.output, table + "\n")
    print(table)
