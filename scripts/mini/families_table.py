"""The table of both heads on both trunks in the mini world, from what scripts/mini/families.sh leaves.

    python -m scripts.mini.families_table --runs output/mini/families_3000_steps --iterations 8 16 32 64

Expected are <runs>/<name>/<iterations>/<detector>/ of `scripts.evaluate_layout`, colour.json beside it of
`scripts.mini.colour_accuracy`, and <runs>/times.json of `scripts.mini.families_time`. A line for each model and number
of iterations, and one for each bound: real drawings, and what each tokenizer leaves of them. Every number has its 95 %
interval over images. Evaluations of other images, profiles or detectors are an error.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from engine.cli.arguments import script_parser
from util.config import parse_checked
from util.failures import one_line_errors
from util.ranges import positive_int

LABELS = {
    "mae_diffusion": "diffusion, MAE trunk",
    "single_diffusion": "diffusion, single trunk",
    "mae_discrete": "discrete, MAE trunk",
    "single_discrete": "discrete, single trunk",
    "maskgil": "discrete, `maskgil_mini`",
}
DETECTORS = {"judge": "judge", "yolox": "YOLOX"}
TIMES_FILE = "times.json"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser("scripts.mini.families_table", __doc__)
    parser.add_argument("--runs", type=Path, required=True, help="folder with one folder for each name")
    parser.add_argument("--names", nargs="+", choices=tuple(LABELS), default=list(LABELS))
    parser.add_argument("--iterations", nargs="+", type=positive_int, default=[8, 16, 32, 64])
    parser.add_argument("--detectors", nargs="+", choices=tuple(DETECTORS), default=["judge"])
    parser.add_argument("--output", type=Path, default=None, help="write the table to this file too")
    return parse_checked(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors(debug=args.debug):
        from scripts.mini.families import run_table  # slow to import: once the command line is known to be right

        run_table(args)


if __name__ == "__main__":
    main()
