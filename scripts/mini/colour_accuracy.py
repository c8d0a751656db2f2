"""Do objects have the colour that the caption asks for? Read off the pixels of the mini world's pictures.

    python -m scripts.mini.colour_accuracy --images output/a/seed0 output/a/seed1 --output output/a/colour.json

Every annotation with a `colour` is judged inside its own box. A pixel weighs 1 where the class covers at least 0.85 of
its most covered place (the mean of the class's masks over the split, stretched to the box: this leaves out corners, a
donut's hole, an umbrella's handle) and 0 elsewhere. Each such pixel votes for the palette colour nearest in CIELAB,
among those the class comes in, shaded from 0.3 to 1.15 (white from 0.5: darker is grey); lightness counts a quarter,
as shading changes it most. Pixels farther than 12 from every colour (background, outlines, seams) do not vote; the most
votes name the colour, no vote names none, which is wrong. A missing object is wrong too, unless its background happens
to fit. These settings were chosen on the real drawings alone.

Where an image has objects of one class in several colours ("a red apple and a green apple"), no caption says which box
has which (phrases of boxes do): such objects count in the second number and the third, which is of them alone. The
first is of those whose colour the caption decides.

Objects that a nearer one covers by more than 30 % of their box (annotations are stored back to front) are left out and
counted. The same on the real drawings is the bound, on pictures shifted by one image the control for chance. Intervals:
95 % bootstrap over images.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from engine.cli.arguments import script_parser
from util.config import parse_checked
from util.failures import one_line_errors
from util.ranges import positive_int, whole


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser("scripts.mini.colour_accuracy", __doc__)
    parser.add_argument("--coco_root", type=Path, default=Path("data/mini_coco"), help="the mini world's dataset")
    parser.add_argument("--split", default="val2017", help="split that the pictures were made for")
    parser.add_argument("--images", type=Path, nargs="*", default=[], help="folders of pictures, one for each seed")
    parser.add_argument("--output", type=Path, default=None, help="json file of the results (None: not written)")
    parser.add_argument("--max_images", type=positive_int, default=None, help="only the first images of the split")
    parser.add_argument(
        "--num_resamples", type=whole(1, 20000), default=1000, help="bootstrap resamples of the 95 %% intervals"
    )
    return parse_checked(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors(debug=args.debug):
        from scripts.mini.colours import run  # slow to import: once the command line is known to be right

        run(args)


if __name__ == "__main__":
    main()
