"""Trains one of the mini world's two Faster R-CNNs and writes it for `load_detector`.

    python -m scripts.mini.train_detector --output pretrained_models/mini/fasterrcnn_mini.pth
    python -m scripts.mini.train_detector --output pretrained_models/mini/fasterrcnn_mini_judge.pth \
        --arch fasterrcnn_mini_fpn --seed 1 --steps 2400 --soften_prob 0.5

The first is the yardstick of layout fidelity and stage 3's reward; the second, of another architecture and seed, judges
whether what pleases the first is more than its weakness.

The loss is torchvision's: objectness and box regression of the proposals, class and box regression of the regions.
Images are flipped at random, and some are softened (shrunk and enlarged) or overlaid with noise, because the images it
will judge come from a generator, whose edges are never as crisp as a drawing's.

The file holds half-precision weights. Killed, the same command goes on from the last saved state; finished, it does
nothing unless told to --overwrite. At the end AP, AP50, recall and mean IoU on val2017 are printed and written
beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from engine.cli.arguments import SWITCH, script_parser
from models.config import SMALL, SMALL_FPN
from util.config import parse_checked
from util.failures import one_line_errors
from util.ranges import batch_int, fraction, nonnegative_float, nonnegative_int, positive_float, positive_int, seed_int


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser("scripts.mini.train_detector", __doc__)
    parser.add_argument("--data", type=Path, default=Path("data/mini_coco"), help="COCO folder of make_dataset")
    parser.add_argument("--output", type=Path, default=Path(f"pretrained_models/mini/{SMALL}.pth"))
    parser.add_argument("--arch", choices=(SMALL, SMALL_FPN), default=SMALL)
    parser.add_argument("--steps", type=positive_int, default=1200)
    parser.add_argument("--batch_size", type=batch_int, default=16)
    parser.add_argument("--lr", type=positive_float, default=1e-3, help="peak learning rate of AdamW")
    parser.add_argument("--warmup", type=nonnegative_int, default=100, help="steps of linear warmup")
    parser.add_argument("--weight_decay", type=nonnegative_float, default=1e-3)
    parser.add_argument("--soften_prob", type=fraction, default=0.4, help="share of images made soft or noisy")
    parser.add_argument("--seed", type=seed_int, default=0)
    parser.add_argument("--save_freq", type=positive_int, default=250, help="steps between saved states")
    parser.add_argument("--log_freq", type=positive_int, default=50)
    parser.add_argument("--max_images", type=positive_int, default=None, help="use the first images of each split only")
    parser.add_argument("--overwrite", action=SWITCH, default=False, help="train again although the output is there")
    return parse_checked(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors(debug=args.debug):
        from scripts.mini.detector_training import run  # slow to import: once the command line is known to be right

        run(args)


if __name__ == "__main__":
    main()
