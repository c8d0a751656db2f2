"""Trains the mini world's VQ tokenizer (stride 4, 1024 codes) and writes it in the layout of LlamaGen's files.

    python -m scripts.mini.train_vq --data data/mini_coco --output pretrained_models/mini/vq/vq4_mini.pt

    loss = |x - y| + mse_weight (x - y)^2 + edge_weight |grad x - grad y| + (sg(z) - e)^2 + commit_weight (z - sg(e))^2
    y = decode(z + sg(e - z)), z: unit features, e: the nearest unit rows of the codebook, sg: without gradient

Every term is a mean over its elements. The networks start from the mini KL VAE where names and shapes fit, the codebook
from k-means on their features. Codes that were not used for `restart_freq` steps take the place of features of the
batch.
Left out: perceptual and adversarial losses, which need networks of their own.

The file holds float32 weights and the number of groups. Killed, the same command goes on from the last saved state;
finished, it does nothing unless told to --overwrite.
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
    fraction,
    nonnegative_float,
    nonnegative_int,
    positive_float,
    positive_int,
    seed_int,
    width_int,
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser("scripts.mini.train_vq", __doc__)
    parser.add_argument("--data", type=Path, default=Path("data/mini_coco"), help="folder with train2017 and val2017")
    parser.add_argument("--output", type=Path, default=Path("pretrained_models/mini/vq/vq4_mini.pt"))
    parser.add_argument("--init", type=Path, default=Path("pretrained_models/mini/vae/kl8_mini.ckpt"),
                        help="KL VAE to start from, where it fits")  # fmt: skip
    parser.add_argument("--steps", type=positive_int, default=1300)
    parser.add_argument("--batch_size", type=batch_int, default=16)
    parser.add_argument("--lr", type=positive_float, default=1e-3, help="peak learning rate of AdamW")
    parser.add_argument("--warmup", type=nonnegative_int, default=50, help="steps of linear warmup")
    parser.add_argument("--widths", type=width_int, nargs="+", default=[32, 48, 56], help="channels per level")
    parser.add_argument("--groups", type=width_int, default=8, help="GroupNorm groups")
    parser.add_argument("--latent_channels", type=width_int, default=16, help="between the networks and the codes")
    parser.add_argument("--codes", type=width_int, default=1024, help="rows of the codebook")
    parser.add_argument("--code_dim", type=width_int, default=8, help="channels of a code")
    parser.add_argument("--mse_weight", type=nonnegative_float, default=4.0)
    parser.add_argument("--edge_weight", type=nonnegative_float, default=0.25)
    parser.add_argument("--commit_weight", type=nonnegative_float, default=0.25)
    parser.add_argument("--restart_freq", type=positive_int, default=100, help="steps between restarts of unused codes")
    parser.add_argument("--restart_until", type=fraction, default=0.8, help="share of the steps with restarts")
    parser.add_argument("--ema_rate", type=fraction, default=0.995)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16", help="autocast of the forward pass")
    parser.add_argument("--seed", type=seed_int, default=0)
    parser.add_argument("--save_freq", type=positive_int, default=100, help="steps between saved states")
    parser.add_argument("--log_freq", type=positive_int, default=50)
    parser.add_argument("--max_images", type=positive_int, default=None, help="use the first images only")
    parser.add_argument("--overwrite", action=SWITCH, default=False, help="train again although the output is there")
    return parse_checked(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors(debug=args.debug):
        from scripts.mini.vq_training import run  # slow to import: once the command line is known to be right

        run(args)


if __name__ == "__main__":
    main()
