"""Captions of pictures by MARS, one json line each.

    python -m scripts.caption --resume mars.safetensors --lm_path DIR --vae_path vq.pt --images photo.png other.jpg
    python -m scripts.caption --resume CKPT --lm_path DIR --vae_path vq.pt --coco_root ./data/coco --coco_split val2017

A caption is the likeliest token after token, so the same picture has the same caption. --begin says how every caption
begins, and so chooses its language: "a picture of", or 一张图片. Pictures are cut and shrunk to the model's size as in
training. A line is {"file": ..., "caption": ...}, of a dataset with "image_id".
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from engine.cli.arguments import add_config_arg, add_device_arg, script_parser
from engine.cli.arguments_mars_sample import add_mars_args, add_mars_run_args
from util.config import parse_args
from util.failures import one_line_errors
from util.output import require_output_file
from util.ranges import whole


def get_parser() -> argparse.ArgumentParser:
    parser = script_parser("scripts.caption", __doc__)
    add_config_arg(parser)
    add_mars_args(parser)
    group = parser.add_argument_group("which pictures: files, or a dataset's")
    group.add_argument("--images", nargs="+", default=None, metavar="FILE", help="picture files")
    group.add_argument("--coco_root", default=None, help="dataset with annotations/ and the image folders")
    group.add_argument("--coco_split", default="val2017", help="split of --coco_root, in the order of ids")
    group.add_argument("--num_images", type=whole(1, 10**7), default=None, help="its first ones only (None: all)")
    group = parser.add_argument_group("captions")
    group.add_argument("--begin", default="", help="words that every caption begins with; empty: none")
    group.add_argument(
        "--max_words", type=whole(1, 4096), default=64, help="tokens that are written at most after these"
    )
    group.add_argument("--output", default=None, help="file of json lines, replaced (None: they are printed)")
    add_mars_run_args(parser)
    add_device_arg(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raises ValueError for none or two kinds of pictures, and for what is only of one."""
    if bool(args.images) == bool(args.coco_root):
        raise ValueError("say which pictures by exactly one of --images, --coco_root")
    if args.num_images is not None and args.images:
        raise ValueError(f"--num_images {args.num_images} is of --coco_root, not of --images")
    if args.output is not None:
        require_output_file("--output", args.output)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(get_parser(), argv)
    with one_line_errors(debug=args.debug):
        check_args(args)
        from engine.cli.build_mars_sample import write_captions  # imports PyTorch

        print(write_captions(args))


if __name__ == "__main__":
    main()
