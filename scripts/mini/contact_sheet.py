"""A picture to look at: scenes (or single objects) with their boxes and first captions.

python -m scripts.mini.contact_sheet --output sheet.png --size 256 --num_scenes 12
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.cli.arguments import SWITCH, script_parser
from util.config import parse_checked
from util.failures import one_line_errors
from util.output import require_output_file
from util.ranges import seed_int, whole


def main(argv: Sequence[str] | None = None) -> None:
    parser = script_parser("scripts.mini.contact_sheet", __doc__)
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    parser.add_argument("--size", type=whole(16, 1024), default=64, help="resolution at which scenes are drawn")
    parser.add_argument("--cell", type=whole(16, 1024), default=256, help="pixels of one cell of the sheet")
    parser.add_argument("--num_scenes", type=whole(1, 1000), default=24, help="number of scenes")
    parser.add_argument("--columns", type=whole(1, 100), default=6, help="cells in a row")
    parser.add_argument(
        "--single", action=SWITCH, default=False, help="single objects, class by class, in place of scenes"
    )
    parser.add_argument("--boxes", action=SWITCH, was="no_boxes", default=True, help="draw the boxes")
    parser.add_argument("--seed", type=seed_int, default=0, help="seed of the first scene")
    args = parse_checked(parser, argv)
    with one_line_errors(debug=args.debug):
        require_output_file("--output", args.output)
        from scripts.mini.sheet import run  # slow to import: once the command line is known to be right

        run(args)


if __name__ == "__main__":
    main()
