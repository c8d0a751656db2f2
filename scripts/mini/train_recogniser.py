"""Trains the mini world's speech recogniser and writes it as a Hugging Face directory.

    apt-get install espeak-ng
    python -m scripts.mini.train_recogniser --data data/mini_coco --output pretrained_models/mini/recogniser-mini

espeak-ng reads the dataset's captions in many voices, speeds and pitches; a small Wav2Vec2-BERT with a CTC head over
letters and marks learns to write them down (mel features, four Conformer layers). At the end it hears held-out captions
in voices that it was not trained on, through the pipeline of `scripts.sample --speech`; the word error rates are
printed and written into the directory. Killed, the same command goes on from the last saved state; finished, it does
nothing unless told to --overwrite. Left out: noise, rooms, human voices.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from engine.cli.arguments import SWITCH, script_parser
from util.config import parse_checked
from util.failures import one_line_errors
from util.ranges import batch_int, depth_int, nonnegative_int, positive_float, positive_int, seed_int, width_int


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser("scripts.mini.train_recogniser", __doc__)
    parser.add_argument("--data", type=Path, default=Path("data/mini_coco"), help="COCO folder of the mini world")
    parser.add_argument("--output", type=Path, default=Path("pretrained_models/mini/recogniser-mini"))
    parser.add_argument("--num_spoken", type=positive_int, default=4000, help="captions read aloud to train on")
    parser.add_argument("--num_held_out", type=positive_int, default=100, help="held-out captions for each new voice")
    parser.add_argument("--steps", type=positive_int, default=2400)
    parser.add_argument("--batch_size", type=batch_int, default=8)
    parser.add_argument("--lr", type=positive_float, default=2e-3, help="peak learning rate of AdamW")
    parser.add_argument("--warmup", type=nonnegative_int, default=100, help="steps of linear warmup")
    parser.add_argument("--width", type=width_int, default=128)
    parser.add_argument("--depth", type=depth_int, default=4, help="Conformer layers")
    parser.add_argument("--seed", type=seed_int, default=0)
    parser.add_argument("--save_freq", type=positive_int, default=100, help="steps between saved states")
    parser.add_argument("--log_freq", type=positive_int, default=50)
    parser.add_argument("--overwrite", action=SWITCH, default=False, help="train again although the output is there")
    return parse_checked(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors(debug=args.debug):
        from scripts.mini.recogniser_training import run  # slow to import: once the command line is known to be right

        run(args)


if __name__ == "__main__":
    main()
