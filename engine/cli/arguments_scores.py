"""The flags of previews and scores while training."""

from __future__ import annotations

import argparse

from util.config import Switch
from util.ranges import batch_int, nonnegative_int, positive_int


def add_preview_args(parser: argparse.ArgumentParser) -> None:
    """Samples of a fixed set of layouts while training."""
    group = parser.add_argument_group("previews and scores while training")
    group.add_argument(
        "--online_eval", action=Switch, default=False,
        help="sample a fixed set of layouts every --eval_freq epochs, and score them with --eval_detector"
    )  # fmt: skip
    group.add_argument("--eval_freq", type=positive_int, default=40, help="epochs between rounds of --online_eval")
    add_score_args(group)
    group.add_argument(
        "--sample_freq", type=nonnegative_int, default=0, help="optimizer steps between previews; 0: none"
    )
    group.add_argument("--num_preview", type=batch_int, default=8, help="images in a preview")


def add_score_args(group: argparse._ArgumentGroup) -> None:
    """Which layouts are scored while training, and by what."""
    group.add_argument(
        "--eval_detector",
        default="",
        help="detector that scores (Faster R-CNN .pth or .onnx); empty: pictures only",
    )
    group.add_argument("--eval_profile", default="structmar-256", help="protocol of the scores: name or yaml file")
    group.add_argument("--eval_images", type=positive_int, default=64, help="layouts scored: the profile's first ones")
    group.add_argument("--eval_split", default="",
                       help="split of the layouts; empty: --coco_split (pictures), the profile's (scores)")  # fmt: skip
    group.add_argument("--eval_bsz", type=batch_int, default=8, help="images sampled at a time")
