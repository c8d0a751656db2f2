"""Writes the mini world's scenes as a COCO dataset: images, instances_*.json and captions_*.json, from a seed.

python -m scripts.mini.make_dataset --output_dir data/mini_coco --num_train 6000 --num_val 500 --size 64 --seed 0

Image k of a split depends on (seed, split, k) alone. A finished dataset with the same settings is left as it is (one
that lacks phrases gets them); other settings in the same folder are an error; an interrupted run is written anew.
--chinese writes captions in Chinese besides, for a finished dataset too.
Annotations have a "colour", where the class has several, and a "phrase" ("large red umbrella").
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from engine.cli.arguments import SWITCH, script_parser
from util.config import parse_checked
from util.failures import one_line_errors
from util.ranges import picture_size, seed_int, whole


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = script_parser("scripts.mini.make_dataset", __doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("data/mini_coco"), help="folder of the dataset")
    parser.add_argument("--num_train", type=whole(1, 10**6), default=6000, help="images in train2017")
    parser.add_argument("--num_val", type=whole(1, 10**6), default=500, help="images in val2017")
    parser.add_argument("--size", type=whole(16, 1024), default=64, help="side of the images in pixels")
    parser.add_argument("--sizes", type=picture_size, nargs="+", default=None,
                        help="HEIGHTxWIDTH of the images in turn, e.g. 64x64 96x64 64x96; none: --size")  # fmt: skip
    parser.add_argument("--colour_words", action=SWITCH, default=True, help="captions name colours")
    parser.add_argument("--chinese", action=SWITCH, default=False,
                        help="Chinese captions too, in captions_<split>.zh.json, under the same ids")  # fmt: skip
    parser.add_argument("--seed", type=seed_int, default=0, help="seed of the whole dataset")
    parser.add_argument("--num_workers", type=whole(1, 256), default=2, help="processes that draw")
    return parse_checked(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors(debug=args.debug):
        from scripts.mini.dataset import run  # slow to import: once the command line is known to be right

        run(args)


if __name__ == "__main__":
    main()
