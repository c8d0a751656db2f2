"""Trains the mini world's KL VAE (stride 8, 16 latent channels) and writes it in kl16.ckpt's layout.

    python -m scripts.mini.train_vae --data data/mini_coco --output pretrained_models/mini/vae/kl8_mini.ckpt

    loss = |x - y| + mse_weight (x - y)^2 + edge_weight |grad x - grad y| + kl_weight KL
    y = decode(mean + std * noise + extra)

Every term is a mean over its elements (the KL over the latents'). `extra` is noise of a random strength below
`latent_noise`: the latents of a generator are never exact, and a decoder that has seen this is smooth around the data.
The square weighs large errors, which are small objects, against textures, which are everywhere.
Left out: perceptual and adversarial losses, which need networks of their own.

The file holds half-precision weights, the number of groups and the latent scale (1 / std of the latents). Killed, the
same command goes on from the last saved state; finished, it does nothing unless told to --overwrite.

The committed file was made in two runs on two shared CPU cores, 14 minutes each (held-out MSE 0.0190, then 0.0112):

    python -m scripts.mini.train_vae --output FIRST --mse_weight 1 --edge_weight 0.5
    python -m scripts.mini.train_vae --init FIRST --steps 2600 --warmup 50
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
    parser = script_parser("scripts.mini.train_vae", __doc__)
    parser.add_argument("--data", type=Path, default=Path("data/mini_coco"), help="folder with train2017 and val2017")
    parser.add_argument("--output", type=Path, default=Path("pretrained_models/mini/vae/kl8_mini.ckpt"))
    parser.add_argument("--steps", type=positive_int, default=2200)
    parser.add_argument("--batch_size", type=batch_int, default=16)
    parser.add_argument("--lr", type=positive_float, default=1e-3, help="peak learning rate of AdamW")
    parser.add_argument("--warmup", type=nonnegative_int, default=100, help="steps of linear warmup")
    parser.add_argument("--widths", type=width_int, nargs="+", default=[32, 48, 56, 56], help="channels per level")
    parser.add_argument("--groups", type=width_int, default=8, help="GroupNorm groups")
    parser.add_argument("--latent_channels", type=width_int, default=16)
    parser.add_argument("--kl_weight", type=nonnegative_float, default=1e-3)
    parser.add_argument("--mse_weight", type=nonnegative_float, default=4.0)
    parser.add_argument("--edge_weight", type=nonnegative_float, default=0.25)
    parser.add_argument(
        "--latent_noise", type=nonnegative_float, default=0.15, help="largest extra noise, in stds of the latents"
    )
    parser.add_argument("--ema_rate", type=fraction, default=0.998)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16", help="autocast of the forward pass")
    parser.add_argument("--seed", type=seed_int, default=0)
    parser.add_argument("--init", type=Path, default=None, help="start from the weights of this VAE file")
    parser.add_argument("--save_freq", type=positive_int, default=250, help="steps between saved states")
    parser.add_argument("--log_freq", type=positive_int, default=50)
    parser.add_argument("--max_images", type=positive_int, default=None, help="use the first images only")
    parser.add_argument("--overwrite", action=SWITCH, default=False, help="train again although the output is there")
    return parse_checked(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors(debug=args.debug):
        from scripts.mini.vae_training import run  # slow to import: once the command line is known to be right

        run(args)


if __name__ == "__main__":
    main()
