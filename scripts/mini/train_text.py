"""Trains a small CLIP text model on captions and the classes in their images alone, where there is neither a real CLIP
nor a picture; for planners (scripts.train_planner) on COCO's annotations.

    python -m scripts.mini.train_text --data data/coco --split val2017 --held_out_every 5 --output output/clip-text-coco

Its tokenizer is learned from the training captions. The loss is the binary cross-entropy of the classes in the
caption's image, each read off the word that says it most, so the state of "puppy" says dog, if the captions' images do.
Killed, the same command goes on from the last saved state; finished, it does nothing unless told to --overwrite. At the
end the average precision of classes on the images left out is printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from engine.cli.arguments import SWITCH, script_parser
from util.config import parse_checked
from util.failures import one_line_errors
from util.ranges import (
    batch_int,
    depth_int,
    fraction_below_one,
    nonnegative_int,
    positive_float,
    positive_int,
    seed_int,
    width_int,
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser("scripts.mini.train_text", __doc__)
    parser.add_argument(
        "--data", type=Path, default=Path("data/coco"), help="COCO folder, of which annotations/ is read"
    )
    parser.add_argument("--split", default="val2017")
    parser.add_argument("--held_out_every", type=nonnegative_int, default=0,
                        help="every so manieth image by id is left out; 0: none")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("output/clip-text-coco"))
    parser.add_argument("--steps", type=positive_int, default=1200)
    parser.add_argument("--batch_size", type=batch_int, default=64)
    parser.add_argument("--lr", type=positive_float, default=1.5e-3, help="peak learning rate of AdamW")
    parser.add_argument("--warmup", type=nonnegative_int, default=60, help="steps of linear warmup")
    parser.add_argument("--width", type=width_int, default=128)
    parser.add_argument("--depth", type=depth_int, default=2, help="layers")
    parser.add_argument("--dropout", type=fraction_below_one, default=0.1, help="of the attention's weights")
    parser.add_argument("--min_count", type=positive_int, default=10, help="words as frequent as this are one token")
    parser.add_argument("--seed", type=seed_int, default=0)
    parser.add_argument("--save_freq", type=positive_int, default=200, help="steps between saved states")
    parser.add_argument("--log_freq", type=positive_int, default=50)
    parser.add_argument("--overwrite", action=SWITCH, default=False, help="train again although the output is there")
    return parse_checked(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors(debug=args.debug):
        from scripts.mini.text_training import run  # slow to import: once the command line is known to be right

        run(args)


if __name__ == "__main__":
    main()
