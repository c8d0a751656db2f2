"""One table of several evaluations of scripts.evaluate_layout, with the difference of each to the first.

    python -m scripts.compare output/evaluation_a output/evaluation_b output/evaluation_c

Every number has its 95 % interval. A difference has its own, over the same resampled images for both (paired), which is
narrower than two intervals side by side suggest. Folders with another profile, other images or boxes, another detector
or another number of resamples are refused, and so are folders whose files were changed since they were evaluated.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from engine.cli.arguments import script_parser
from util.config import parse_checked
from util.failures import one_line_errors
from util.output import require_output_file, write_text_atomic


def get_parser() -> argparse.ArgumentParser:
    parser = script_parser("scripts.compare", __doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="--output_dir of an evaluation")
    parser.add_argument("--output", default=None, help="write the table (Markdown) to this file too")
    parser.add_argument("--json", default=None, help="write the numbers to this file")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_checked(get_parser(), argv)
    with one_line_errors(debug=args.debug):
        files = {flag: path for flag, path in (("output", args.output), ("json", args.json)) if path is not None}
        for flag, path in files.items():
            require_output_file(f"--{flag}", path)
        from engine.eval.compare import as_json, compare, format_comparison  # after the command line: it is slow

        comparison = compare(args.folders)
        table = format_comparison(comparison)
        for flag, path in files.items():
            write_text_atomic(Path(path), as_json(comparison) if flag == "json" else table + "\n")
        print(table)


if __name__ == "__main__":
    main()
