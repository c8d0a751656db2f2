"""Pretrains the mini MAR on single-object images by class, as MAR itself is pretrained on ImageNet.

    python -m scripts.mini.pretrain_mar --output pretrained_models/mini/mar_mini.safetensors --steps 1500

It drives the training loop of stages 1 and 2 with `--train_mode class` inputs; a killed run continues by the same
command. The result has MAR's names, like `mar_huge.safetensors`: no rotation, no layout, no text.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from engine.cli.arguments import add_device_arg, script_parser
from util.config import parse_checked
from util.failures import one_line_errors
from util.ranges import batch_int, fraction, positive_float, positive_int, seed_int, threads_int, whole


def get_parser() -> argparse.ArgumentParser:
    result = script_parser("scripts.mini.pretrain_mar", __doc__)
    add = result.add_argument
    add("--vae_path", default="pretrained_models/mini/vae/kl8_mini.ckpt", help="the mini VAE (LDM layout)")
    add("--output", default="pretrained_models/mini/mar_mini.safetensors", help="where the weights go (float16)")
    add("--work_dir", default="output/mini_pretrain", help="run folder: log, metrics, state to continue from, samples")
    add("--num_images", type=whole(1, 10**6), default=6000, help="images drawn, the same number of each class")
    add("--steps", type=positive_int, default=1500, help="optimizer steps")
    add("--batch_size", type=batch_int, default=48)
    add("--lr", type=positive_float, default=1e-3, help="peak rate; warmup over 2 epochs, then half a cosine")
    add("--ema_rate", type=fraction, default=0.998)
    add("--diffusion_batch_mul", type=whole(1, 1024), default=4, help="timesteps per token and image")
    add("--precision", choices=["fp32", "bf16"], default="bf16")
    add("--num_threads", type=threads_int, default=2)
    add("--seed", type=seed_int, default=0)
    add_device_arg(result, default="cpu")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_checked(get_parser(), argv)
    with one_line_errors(debug=args.debug):
        from scripts.mini.mar_pretraining import run  # slow to import: once the command line is known to be right

        return run(args)


if __name__ == "__main__":
    sys.exit(main())
