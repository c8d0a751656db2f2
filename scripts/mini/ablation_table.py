"""One Markdown table of the mini-world ablation, from the results.json files that scripts/mini/ablation.sh leaves.

python -m scripts.mini.ablation_table --runs output/mini/ablation_1000_steps

Each variant's row is the model's; that of the variant without boxes is its row "no layout", as it never saw any. The
last row are the real images, the bound. Files of other images, profiles, detectors, sampling or seeds are an error.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from engine.cli.arguments import script_parser
from util.config import parse_checked
from util.failures import one_line_errors


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser("scripts.mini.ablation_table", __doc__)
    parser.add_argument("--runs", type=Path, required=True, help="folder with one folder for each variant")
    parser.add_argument("--output", type=Path, default=None, help="write the table to this file too")
    return parse_checked(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors(debug=args.debug):
        from scripts.mini.ablation import run  # slow to import: once the command line is known to be right

        run(args)


if __name__ == "__main__":
    main()
