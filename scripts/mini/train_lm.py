"""Trains the mini world's language model, in English and Chinese, and writes it as a Hugging Face directory.

    python -m scripts.mini.make_dataset --chinese
    python -m scripts.mini.train_lm --data data/mini_coco --output pretrained_models/mini/lm-mini

A causal language model of Qwen2's kind predicts the next token of captions, each in one of the two languages by chance:

    loss   cross-entropy of w_1 .. w_n, EOS behind BOS, w_1 .. w_n

Its tokenizer is a byte-level BPE of at most 1,000 tokens. Chinese has no spaces, so its characters are parted first:
merges would make one token of a whole phrase otherwise, and colours would be no words of their own. Killed, the same
command goes on from the last saved state; finished, it does nothing unless told to --overwrite.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from engine.cli.arguments import SWITCH, script_parser
from util.config import parse_checked
from util.failures import one_line_errors
from util.ranges import batch_int, depth_int, nonnegative_int, positive_float, positive_int, seed_int, whole, width_int


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser("scripts.mini.train_lm", __doc__)
    parser.add_argument("--data", type=Path, default=Path("data/mini_coco"), help="COCO folder of the mini world")
    parser.add_argument("--output", type=Path, default=Path("pretrained_models/mini/lm-mini"))
    parser.add_argument("--steps", type=positive_int, default=500)
    parser.add_argument("--batch_size", type=batch_int, default=64)
    parser.add_argument("--lr", type=positive_float, default=3e-3, help="peak learning rate of AdamW")
    parser.add_argument("--warmup", type=nonnegative_int, default=30, help="steps of linear warmup")
    parser.add_argument("--width", type=width_int, default=128, help="a multiple of 8; the MLP is three times as wide")
    parser.add_argument("--depth", type=depth_int, default=4, help="layers")
    parser.add_argument("--positions", type=whole(64, 32768), default=512,
                        help="that the model is made for; all but captions are for visual experts")  # fmt: skip
    parser.add_argument("--vocab_size", type=whole(258, 100000), default=1000, help="at most so many tokens")
    parser.add_argument("--seed", type=seed_int, default=0)
    parser.add_argument("--save_freq", type=positive_int, default=100, help="steps between saved states")
    parser.add_argument("--log_freq", type=positive_int, default=25)
    parser.add_argument("--max_images", type=positive_int, default=None, help="use the first images only")
    parser.add_argument("--overwrite", action=SWITCH, default=False, help="train again although the output is there")
    return parse_checked(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors(debug=args.debug):
        from scripts.mini.lm_training import run  # slow to import: once the command line is known to be right

        run(args)


if __name__ == "__main__":
    main()
