"""One Markdown table of what phrases of boxes decide, from what scripts/mini/phrases.sh leaves.

python -m scripts.mini.phrases_table --runs output/mini/phrases_250

Expected are <runs>/<way>/ of `scripts.evaluate_layout` and colour.json in it, of `scripts.mini.colour_accuracy`.
Every number is in percent, with its 95 % interval over images. Evaluations of other images, profiles or detectors are
an error.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from engine.cli.arguments import script_parser
from util.config import parse_checked
from util.failures import one_line_errors

WAYS = {
    "before_named_class": "captions name colours, boxes by class; weights without phrases",
    "named_class": "captions name colours, boxes by class",
    "named_phrase": "captions name colours, boxes by phrase",
    "named_both": "captions name colours, boxes by class and phrase",
    "silent_class": "captions without colours, boxes by class",
    "silent_phrase": "captions without colours, boxes by phrase",
    "silent_both": "captions without colours, boxes by class and phrase",
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser("scripts.mini.phrases_table", __doc__)
    parser.add_argument("--runs", type=Path, required=True, help="folder with one folder for each way")
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS), help="the lines of the table")
    parser.add_argument("--output", type=Path, default=None, help="write the table to this file too")
    return parse_checked(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors(debug=args.debug):
        from scripts.mini.phrase_results import run  # slow to import: once the command line is known to be right

        run(args)


if __name__ == "__main__":
    main()
