"""Do MARS's captions say what is in the pictures, in English and in Chinese? Held-out scenes of the mini world.

    python -m scripts.mini.caption_accuracy --resume CKPT --lm_path DIR --vae_path vq.pt --output captions.json

Every picture is described twice, from "a picture of" and from 一张图片，, word by word, and the caption is read by the
words that the dataset's own captions use. Of the scene's objects, with 95 % bootstrap intervals over scenes:

    objects told                 share whose class is told, each counted once
    told that are there          share of what is told that the scene has, by class
    classes in the right number  share of the scene's classes of which as many are told as there are
    told objects in their colour of objects told whose class has several colours
    whole scene right            captions that name exactly the scene's objects, numbers and colours

The dataset's own captions, read in the same way, are the bound, the captions of the next scene's picture the control.
The loss of the dataset's captions after their picture stands beside that after the next scene's: what seeing is worth.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from engine.cli.arguments import add_device_arg, script_parser
from engine.cli.arguments_mars_sample import add_mars_args, add_mars_run_args
from scripts.mini.scene_arguments import add_scene_args
from util.config import parse_checked
from util.failures import one_line_errors
from util.ranges import whole


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser("scripts.mini.caption_accuracy", __doc__)
    add_mars_args(parser)
    add_scene_args(parser)
    parser.add_argument("--max_words", type=whole(1, 4096), default=64, help="tokens of a caption at most")
    add_mars_run_args(parser)
    add_device_arg(parser)
    return parse_checked(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors(debug=args.debug):
        from scripts.mini.described import run  # slow to import: once the command line is known to be right

        run(args)


if __name__ == "__main__":
    main()
