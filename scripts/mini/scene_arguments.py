"""Flags of what is measured on held-out scenes of the mini world."""

from __future__ import annotations

import argparse
from pathlib import Path

from util.ranges import positive_int, whole


def add_scene_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("held-out scenes")
    group.add_argument("--coco_root", type=Path, default=Path("data/mini_coco"), help="the mini world's dataset")
    group.add_argument("--split", default="val2017", help="split that no training has seen")
    group.add_argument("--num_scenes", type=positive_int, default=250, help="the first ones by id")
    group.add_argument("--num_resamples", type=whole(1, 20000), default=1000, help="of the 95 %% intervals")
    group.add_argument("--output", type=Path, default=None, help="json file of the results (None: not written)")
