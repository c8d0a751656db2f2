"""Seconds an image of several models in several numbers of iterations: from captions and boxes to pixels, in turns.

    python -m scripts.mini.families_time --runs output/mini/families_3000_steps --iterations 8 64 --output times.json \
        --models mae_diffusion=pretrained_models/mini/vae/kl8_mini.ckpt maskgil=pretrained_models/mini/vq/vq4_mini.pt

Drawn are the first held-out scenes, all in one batch, with the options of the evaluation in the run's folder. Every
setting runs once to warm up and then --repeats times, the settings taking turns, so that what else the machine does
falls on all. The file holds the medians.
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
    parser = script_parser("scripts.mini.families_time", __doc__)
    parser.add_argument("--runs", type=Path, required=True, help="folder with a run folder for each model")
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=VAE", help="models and their tokenizers")
    add_text_encoder_args(parser, is_required=True)
    parser.add_argument("--coco_root", type=Path, default=Path("data/mini_coco"), help="dataset of the held-out scenes")
    parser.add_argument("--iterations", nargs="+", type=positive_int, default=[8, 16, 32, 64])
    parser.add_argument("--num_images", type=positive_int, default=16, help="scenes of a batch")
    parser.add_argument("--repeats", type=positive_int, default=3, help="timed runs of each setting")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--num_threads", type=threads_int, default=1)
    parser.add_argument("--output", type=Path, required=True, help="json file of the medians")
    return parse_checked(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors(debug=args.debug):
        from scripts.mini.families import run_times  # slow to import: once the command line is known to be right

        run_times(args)


if __name__ == "__main__":
    main()
