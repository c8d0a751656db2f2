"""The table of what MARS reaches, from the files of three commands: captions, drawings and text.

    python -m scripts.mini.mars_table --captions captions.json --drawings drawings.json --text text.json

The files are --output of scripts.mini.caption_accuracy, drawing_accuracy and text_equality.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from engine.cli.arguments import script_parser
from util.config import parse_checked
from util.failures import one_line_errors


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser("scripts.mini.mars_table", __doc__)
    parser.add_argument("--captions", type=Path, required=True, help="json file of scripts.mini.caption_accuracy")
    parser.add_argument("--drawings", type=Path, required=True, help="json file of scripts.mini.drawing_accuracy")
    parser.add_argument("--text", type=Path, required=True, help="json file of scripts.mini.text_equality")
    parser.add_argument("--output", type=Path, default=None, help="Markdown file of the tables (None: printed alone)")
    return parse_checked(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors(debug=args.debug):
        from scripts.mini.mars_tables import run  # slow to import: once the command line is known to be right

        run(args)


if __name__ == "__main__":
    main()
