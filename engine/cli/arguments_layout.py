"""Flags of layout files, shared by all programs that read one."""

from __future__ import annotations

import argparse

from engine.data.layout_formats import LAYOUT_FORMATS
from util.ranges import picture_size


def add_layout_format_args(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--layout_format", default=None, choices=LAYOUT_FORMATS, help="what --layout is written in; None: its keys tell"
    )
    group.add_argument(
        "--layout_canvas", type=picture_size, default=None,
        help="HEIGHTxWIDTH of the canvas whose pixels LayoutGPT's text counts, like 64x64"
    )  # fmt: skip
