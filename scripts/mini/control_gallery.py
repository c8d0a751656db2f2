"""The pictures of models/sampling/README.md: what each control of the layout does, each column drawn by its command.

    python -m scripts.mini.control_gallery --runs output/mini/gallery --output output/mini/gallery

Every column is what `scripts.sample` draws with the committed weights and the column's flags, into a folder of --runs;
folders that are there already are not drawn again. The commands are printed. --names picks pictures.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.cli.arguments import script_parser
from util.config import parse_checked
from util.failures import one_line_errors
from util.output import require_output_dir
from util.ranges import threads_int

CONFIG = "configs/mini_sample.yaml"
PLAIN = "configs/layouts/mini.json"
ROUGH = "configs/layouts/mini_rough.json"
ONE = "configs/layouts/mini_spoken.json"
PLANNER = "pretrained_models/mini/planner_mini.safetensors"
THREE = '--prompt "a clock, a blue vase and an orange on a wooden table" --num_images 3'


@dataclass(frozen=True)
class Column:
    """folder: of what is drawn. flags: of `scripts.sample`, beyond those of all columns. title: what stands above; "":
    the flags. layout: instead of the picture's own file; "": none."""

    folder: str
    flags: str = ""
    title: str = ""
    layout: str | None = None


@dataclass(frozen=True)
class Figure:
    """One picture: a column for each command, the first with boxes, and a row for each of the first `num_rows` scenes
    of the layout file. maps_of: behind the first column, the maps of auto layout guidance before this iteration; None:
    none."""

    name: str
    layout: str
    columns: tuple[Column, ...]
    num_rows: int
    maps_of: int | None = None


FIGURES = (
    Figure(
        "control_schedule",
        PLAIN,
        (
            Column("plain", title="the layout counts throughout"),
            Column("half", "--layout_schedule 0.4 0.2"),
            Column("early", "--layout_schedule 0.05 0.1"),
            Column("none", "--drop_grounding_tokens"),
        ),
        num_rows=3,
    ),
    Figure(
        "control_strength",
        PLAIN,
        (
            Column("one", title="1, as trained"),
            Column("zero", "--layout_scale 0"),
            Column("half", "--layout_scale 0.5"),
            Column("two", "--layout_scale 2"),
        ),
        num_rows=3,
    ),
    Figure(
        "control_auto",
        ROUGH,
        (
            Column("plain", title="the boxes as given"),
            Column("once", "--mask_threshold 0.5 --start_step 4"),
            Column("updated", "--mask_threshold 0.5 --start_step 4 --auto_update"),
        ),
        num_rows=3,
        maps_of=4,
    ),
    Figure(
        "control_negative",
        ONE,
        (
            Column("plain", title="no negative prompt"),
            Column("red", '--negative_prompt "a red umbrella"'),
            Column("yellow", '--negative_prompt "a yellow kite"'),
        ),
        num_rows=1,
    ),
    Figure(
        "control_planner",
        "",
        (
            Column("planned", f"--planner_path {PLANNER} {THREE}", title="--layout auto", layout="auto"),
            Column("none", THREE, title="the caption alone"),
        ),
        num_rows=3,
    ),
)


def command_of(figure: Figure, column: Column, runs: Path) -> str:
    """What a user types for one column."""
    layout = figure.layout if column.layout is None else column.layout
    flags = f"--config {CONFIG} --layout {shlex.quote(layout)} {column.flags}".strip()
    return f"python -m scripts.sample {flags} --output_dir {runs / figure.name / column.folder}"


def get_parser() -> argparse.ArgumentParser:
    parser = script_parser("scripts.mini.control_gallery", __doc__)
    parser.add_argument("--runs", type=Path, required=True, help="folder of what the columns' commands draw")
    parser.add_argument("--output", type=Path, required=True, help="folder of the pictures, NAME.png")
    parser.add_argument("--names", nargs="+", choices=[figure.name for figure in FIGURES],
                        default=[figure.name for figure in FIGURES], help="pictures to make")  # fmt: skip
    parser.add_argument("--num_threads", type=threads_int, default=1, help="CPU threads of the commands")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_checked(get_parser(), argv)
    with one_line_errors(debug=args.debug):
        for flag in ("runs", "output"):
            require_output_dir(f"--{flag}", vars(args)[flag])
        from scripts.mini.gallery import run  # slow to import: once the command line is known to be right

        run(args)


if __name__ == "__main__":
    main()
