"""A picture of every edit: before, the cells that are drawn anew, after.

    python -m scripts.mini.edit_gallery --output .github/images/edits.png

The first picture of each row is drawn from `configs/layouts/mini.json` (the outpainted one is one of these, too), then
edited as `scripts.sample --image` does, with the weights' own options.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.cli.arguments import script_parser
from scripts.mini.moved_objects import add_weight_args
from util.config import parse_checked
from util.failures import one_line_errors
from util.output import require_output_file
from util.ranges import seed_int, whole


def main(argv: Sequence[str] | None = None) -> None:
    parser = script_parser("scripts.mini.edit_gallery", __doc__)
    add_weight_args(parser)
    parser.add_argument("--layout", default="configs/layouts/mini.json", help="layout file of the pictures before")
    parser.add_argument("--seed", type=seed_int, default=0, help="of the pictures before and after")
    parser.add_argument("--side", type=whole(64, 1024), default=192, help="pixels of a picture in the sheet")
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    args = parse_checked(parser, argv)
    with one_line_errors(debug=args.debug):
        require_output_file("--output", args.output)
        from scripts.mini.edit_sheet import run  # slow to import: once the command line is known to be right

        run(args)


if __name__ == "__main__":
    main()
