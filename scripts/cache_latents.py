"""Computes the latents and text states of a COCO split once, so that training reads them instead of images; or the
latents of a folder of pictures by class.

    python -m scripts.cache_latents --coco_root ./data/coco --coco_split train2014 --cached_path ./data/cache/train2014
    python -m scripts.cache_latents --class_root ./data/imagenet --cached_path ./data/cache/imagenet

Writes <cached_path>/latents (both flips of the centre crop, 2 x 32 x 16 x 16 float32 an image at 256 px: 66 kB; with a
VQ tokenizer 2 x 16 x 16 codes of 16 bits: 1 kB) and <cached_path>/text (one state per token, about 25 kB a caption for
CLIP ViT-B/32). If interrupted, run it again: what is there stays, but for items that are damaged or whose picture or
caption is another one now. Under torchrun the processes share the work.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from engine.cli.arguments import (
    SWITCH,
    VAE_HELP,
    add_config_arg,
    add_device_arg,
    add_text_encoder_args,
    script_parser,
)
from util.config import parse_args
from util.failures import first_process_speaks, one_line_errors
from util.output import require_output_dir
from util.ranges import batch_int, pixels_int, positive_float, workers_int


def get_parser() -> argparse.ArgumentParser:
    parser = script_parser("scripts.cache_latents", __doc__)
    add_config_arg(parser)
    parser.add_argument("--coco_root", default="", help="folder with annotations/ and the image folders")
    parser.add_argument("--class_root", default="", help="instead: folder with train/, a folder of pictures per class")
    parser.add_argument(
        "--coco_split",
        default="train2014",
        help="e.g. train2014, val2017: any split of jsons or sidecars; a+b joins two",
    )
    parser.add_argument("--cached_path", required=True, help="where to write latents/ and text/; one folder per split")
    parser.add_argument("--vae_path", default="pretrained_models/vae/kl16.ckpt", help=VAE_HELP)
    parser.add_argument(
        "--latent_scale", type=positive_float, help="factor of the latents; default: the VAE file's, or MAR's"
    )
    add_text_encoder_args(parser, "pretrained_models/clip-vit-base-patch32")
    parser.add_argument("--img_size", type=pixels_int, default=256, help="side of the centre crop, in pixels")
    parser.add_argument(
        "--batch_size", type=batch_int, default=32, help="images at a time; captions: eight times as many"
    )
    parser.add_argument("--num_workers", type=workers_int, default=4, help="processes that read images")
    add_device_arg(parser)
    parser.add_argument("--latents", action=SWITCH, was="no_latents", default=True, help="cache latents")
    parser.add_argument("--text", action=SWITCH, was="no_text", default=True, help="cache text states")
    parser.add_argument(
        "--check_data", action=SWITCH, default=False, help="look at all that is read, then end; write nothing"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    with first_process_speaks():
        args = parse_args(get_parser(), argv)
    with one_line_errors("cache_latents", args.debug):
        if not args.latents and not args.text:
            raise ValueError("--no-latents and --no-text together leave nothing to do")
        if bool(args.coco_root) == bool(args.class_root):
            raise ValueError(
                f"one of --coco_root and --class_root is needed, got '{args.coco_root}' and '{args.class_root}'"
            )
        if args.class_root and not args.latents:
            raise ValueError("--no-latents with --class_root leaves nothing to do: pictures by class have no captions")
        require_output_dir("--cached_path", args.cached_path)
        from engine.cli.build_cache import cache_split  # imports PyTorch: once the arguments are known to be right

        for line in cache_split(args):
            print(line)


if __name__ == "__main__":
    main()
