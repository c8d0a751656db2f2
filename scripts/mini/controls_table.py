"""What each control of the layout does in the mini world, as a table, from what scripts/mini/controls.sh leaves.

    python -m scripts.mini.controls_table --runs output/mini/controls_250 \
        --models structmar_mini_stage2=pretrained_models/mini/vae/kl8_mini.ckpt --controls plain fading

Expected are <runs>/<model>/<control>/ of `scripts.evaluate_layout` and colour.json in it of
`scripts.mini.colour_accuracy`. The first control is what the others differ from, image by image. Each line names its
flags, read from the evaluation. Evaluations of other images, profiles or detectors are an error.

Seconds are of the processor, of all its threads, from captions and boxes to pixels: the first held-out scenes in one
batch, every setting once to warm up and then --repeats times, the settings taking turns, so that what else the machine
does falls on all. Their medians are kept in <runs>/times.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from engine.cli.arguments import add_text_encoder_args, script_parser
from models.config import PRECISIONS
from util.config import parse_checked
from util.failures import one_line_errors
from util.ranges import positive_int, threads_int


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser("scripts.mini.controls_table", __doc__)
    parser.add_argument("--runs", type=Path, required=True, help="folder with a folder for each model")
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=VAE", help="models and their tokenizers")
    parser.add_argument("--controls", nargs="+", required=True, help="folders of each model, the plain one first")
    parser.add_argument("--weights", type=Path, default=Path("pretrained_models/mini"), help="has NAME.safetensors")
    add_text_encoder_args(parser, "pretrained_models/mini/clip-text-mini")
    parser.add_argument("--coco_root", type=Path, default=Path("data/mini_coco"), help="dataset of the held-out scenes")
    parser.add_argument("--num_images", type=positive_int, default=16, help="scenes of a timed batch")
    parser.add_argument("--repeats", type=positive_int, default=3, help="timed runs of each setting")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of timed runs")
    parser.add_argument("--num_threads", type=threads_int, default=1)
    parser.add_argument("--output", type=Path, default=None, help="write the table to this file too")
    return parse_checked(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors(debug=args.debug):
        from scripts.mini.controls import run_table  # slow to import: once the command line is known to be right

        run_table(args)


if __name__ == "__main__":
    main()
