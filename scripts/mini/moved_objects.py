"""Objects of held-out drawings moved, removed and repainted: are they where they shall be, and does the rest stay?

    python -m scripts.mini.moved_objects --max_images 250 --output output/mini/moved.json

One object of each drawing is chosen at random, with a new place for its box, away from the old one and from the other
objects. Then the drawing is edited as `scripts.sample --image` does: the object is moved; removed, under a caption that
lists the others; repainted in its box. A detector that was never a reward judges: an object is found where it sees its
class with IoU 0.5, left where it still sees it in the old box. Neighbours are the other objects that it found in the
drawing; those are near of which a hidden cell covers some of the box. The last row is what the model draws of the same
layouts, objects moved, from nothing. Intervals: 95 % bootstrap over images.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from engine.cli.arguments import VAE_HELP, add_device_arg, add_text_encoder_args, script_parser
from models.config import PRECISIONS
from util.config import parse_checked
from util.failures import one_line_errors
from util.output import require_output_file
from util.ranges import batch_int, positive_int, seed_int, threads_int, whole

MINI = "pretrained_models/mini"


def add_weight_args(parser: argparse.ArgumentParser) -> None:
    """The model and its frozen parts, the committed ones by default."""
    parser.add_argument("--resume", default=f"{MINI}/structmar_mini_stage2.safetensors",
                        help="weights: a training checkpoint or an exported file")  # fmt: skip
    parser.add_argument("--vae_path", default=f"{MINI}/vae/kl8_mini.ckpt", help=VAE_HELP)
    add_text_encoder_args(parser, f"{MINI}/clip-text-mini")
    parser.add_argument("--num_threads", type=threads_int, default=None, help="CPU threads (None: PyTorch's choice)")
    add_device_arg(parser)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser("scripts.mini.moved_objects", __doc__)
    add_weight_args(parser)
    parser.add_argument("--detector", default=f"{MINI}/fasterrcnn_mini_judge.pth", help="the judge's weights")
    parser.add_argument("--coco_root", type=Path, default=Path("data/mini_coco"), help="the mini world's dataset")
    parser.add_argument("--split", default="val2017", help="split whose drawings are edited")
    parser.add_argument("--max_images", type=positive_int, default=None, help="only the first images of the split")
    parser.add_argument("--seed", type=seed_int, default=0, help="of objects, places and images")
    parser.add_argument("--output", type=Path, default=None, help="json file of the results (None: not written)")
    parser.add_argument(
        "--num_resamples", type=whole(1, 20000), default=1000, help="bootstrap resamples of the 95 %% intervals"
    )
    parser.add_argument("--batch_size", type=batch_int, default=50, help="images sampled at a time")
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS, help="of weights and matrix products")
    return parse_checked(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors(debug=args.debug):
        if args.output is not None:
            require_output_file("--output", args.output)
        from scripts.mini.moves import run  # slow to import: once the command line is known to be right

        run(args)


if __name__ == "__main__":
    main()
