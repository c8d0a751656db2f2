"""The flags of pretraining by class (main_mar.py --train_mode class)."""

from __future__ import annotations

import argparse


def add_class_args(parser: argparse.ArgumentParser) -> None:
    """Pictures by class."""
    group = parser.add_argument_group("data of --train_mode class")
    group.add_argument("--class_root", default="",
                       help="folder with train/, which has a folder of pictures for each class, as ImageNet's; the "
                            "labels are the folders in the order of their names")  # fmt: skip
