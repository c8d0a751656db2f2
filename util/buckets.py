"""Picture sizes for training on several aspect ratios: which there are, and which one suits an image.

The rule is Lumina-mGPT's (arXiv:2408.02657): sizes are whole cells, at most as many as the square has, and none could
be wider and higher by a cell. Sizes are (height, width); texts are HxW.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TypeAlias

Size: TypeAlias = tuple[int, int]  # (height, width) of a picture

MAX_RATIO = 4.0  # of the longer to the shorter side
BUCKET_CELL = 32  # pixels
CELLS_OF_SIDE = 8  # of the square, at least: smaller squares have smaller cells


def bucket_cell(side: int, step: int) -> int:
    """Pixels of a cell: 32, or an eighth of the square's side where that is less, in whole tokens of `step` pixels."""
    return step * max(1, min(BUCKET_CELL, side // CELLS_OF_SIDE) // step)


def bucket_sizes(side: int, cell: int = BUCKET_CELL, max_ratio: float = MAX_RATIO) -> tuple[Size, ...]:
    """All sizes of about the area of a square of `side` pixels, from the highest to the widest.

    Raises ValueError if a cell does not fit into the square.
    """
    if not 1 <= cell <= side:
        raise ValueError(f"cells of {cell} px do not fit into a square of {side} px")
    most = (side // cell) ** 2
    sizes = [
        (rows * cell, columns * cell)
        for columns in range(1, most + 1)
        for rows in range(most // columns, 0, -1)
        if (rows + 1) * (columns + 1) > most and max(rows, columns) <= max_ratio * min(rows, columns)
    ]
    return tuple(sorted(sizes, key=lambda size: (size[1] / size[0], size[1])))


def ratio_distance(size: Size, other: Size) -> float:
    """How far two shapes are apart: the logarithm of the ratio of their aspect ratios; 0 for the same shape."""
    return abs(math.log((size[0] * other[1]) / (size[1] * other[0])))


def nearest_size(height: int, width: int, sizes: Sequence[Size]) -> Size:
    """The size of which an image loses least when it is cut to it; of several, the largest, then the first."""
    return min(sizes, key=lambda size: (ratio_distance((height, width), size), -size[0] * size[1]))


def read_size(text: str) -> Size:
    """(height, width) of a text like 96x64. Raises ValueError for any other text."""
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if found is None:
        raise ValueError(f"a size is HEIGHTxWIDTH in pixels, like 96x64; got {text!r}")
    return int(found[1]), int(found[2])


def size_name(size: Size) -> str:
    """The text that `read_size` reads."""
    return f"{size[0]}x{size[1]}"
