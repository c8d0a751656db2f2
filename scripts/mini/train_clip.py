"""Trains the mini world's CLIP text encoder and writes it as a Hugging Face directory.

    python -m scripts.mini.train_clip --data data/mini_coco --output pretrained_models/mini/clip-text-mini

A small `CLIPTextModel` learns against a convolutional image tower, which is thrown away afterwards, by the sum of

    contrast of captions   InfoNCE over EOS state . pooled image, both directions (CLIP)
    contrast of tokens     InfoNCE over mean_tokens max_patches token . patch, both directions (FILIP, arXiv 2111.07783)
    words                  cross-entropy of the token's own word and of the word before it, read off its state

StructMAR attends to token states, not to the pooled caption: the second and third terms make the state of "apple" in
"a green apple" say green and apple. Killed, the same command goes on from the last saved state; finished, it does
nothing unless told to --overwrite. Left out: an image tower worth keeping.
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
    nonnegative_float,
    nonnegative_int,
    positive_float,
    positive_int,
    seed_int,
    width_int,
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser("scripts.mini.train_clip", __doc__)
    parser.add_argument("--data", type=Path, default=Path("data/mini_coco"), help="COCO folder of the mini world")
    parser.add_argument("--output", type=Path, default=Path("pretrained_models/mini/clip-text-mini"))
    parser.add_argument("--steps", type=positive_int, default=1200)
    parser.add_argument("--batch_size", type=batch_int, default=64)
    parser.add_argument("--lr", type=positive_float, default=1.5e-3, help="peak learning rate of AdamW")
    parser.add_argument("--warmup", type=nonnegative_int, default=60, help="steps of linear warmup")
    parser.add_argument("--width", type=width_int, default=64, help="width of text encoder and image tower")
    parser.add_argument("--depth", type=depth_int, default=2, help="layers of the text encoder")
    parser.add_argument(
        "--word_weight", type=nonnegative_float, default=0.2, help="weight of each word prediction loss"
    )
    parser.add_argument("--seed", type=seed_int, default=0)
    parser.add_argument("--save_freq", type=positive_int, default=200, help="steps between saved states")
    parser.add_argument("--log_freq", type=positive_int, default=50)
    parser.add_argument("--max_images", type=positive_int, default=None, help="use the first images only")
    parser.add_argument("--overwrite", action=SWITCH, default=False, help="train again although the output is there")
    return parse_checked(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors(debug=args.debug):
        from scripts.mini.clip_training import run  # slow to import: once the command line is known to be right

        run(args)


if __name__ == "__main__":
    main()
