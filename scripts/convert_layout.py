"""Writes a layout file of any format that is read (engine/data/README.md) as ours, or as GLIGEN's.

    python -m scripts.convert_layout --layout answers.json --output layout.json
    python -m scripts.convert_layout --layout layout.json --output gligen.json --to gligen

No weights are needed: labels are checked where a file is sampled.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from engine.cli.arguments import SWITCH, script_parser
from engine.cli.arguments_layout import add_layout_format_args
from util.buckets import read_size
from util.config import parse_checked
from util.failures import one_line_errors
from util.output import require_output_file
from util.read import require_text

TO = ("structmar", "gligen")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser("scripts.convert_layout", __doc__)
    parser.add_argument("--layout", required=True, help="the file that is read")
    add_layout_format_args(parser)
    parser.add_argument("--prompt", default=None, help="replaces the file's own captions")
    parser.add_argument("--output", required=True, help="the file that is written")
    parser.add_argument("--to", default="structmar", choices=TO, help="what it is written in")
    parser.add_argument(
        "--leave_out_bad", action=SWITCH, default=False, help="leave out entries that are wrong, and count them"
    )
    return parse_checked(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors(debug=args.debug):
        require_output_file("--output", args.output)
        if args.prompt is not None:
            require_text(args.prompt, "--prompt")
        from engine.data.layout_convert import (
            convert_layout,  # imports PyTorch: once the command line is known to be right
        )
        from engine.data.layout_formats import FileFormat

        said = FileFormat(args.layout_format, None if args.layout_canvas is None else read_size(args.layout_canvas))
        done = convert_layout(args.layout, args.output, args.to == "gligen", said, args.prompt, args.leave_out_bad)
    print(f"wrote {args.output}: {done.words}")


if __name__ == "__main__":
    main()
