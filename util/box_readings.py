"""What four numbers of a layout file mean: corners or a corner and sides, shares of the picture or its pixels.

Formats of other projects differ here and nowhere says a number which it is. So a box that makes no sense as its format
reads it gets an error that says how it was read, and what the other reading makes of the same numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from util.buckets import Size
from util.read import short_repr

SHARE_SLACK = 1e-6  # beyond the edge: what adding and dividing leave of a box that ends there
PIXEL_SLACK = 0.5  # likewise, where pixels were rounded

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class BoxReading:
    """sides: [x, y, width, height] instead of [x0, y0, x1, y1]. pixels: of a canvas instead of shares of it."""

    sides: bool = False
    pixels: bool = False

    @property
    def words(self) -> str:
        order = "[x, y, width, height]" if self.sides else "[x0, y0, x1, y1]"
        return f"{order} in {'pixels' if self.pixels else '[0, 1]'}"

    def corners(self, numbers: Box, canvas: Size | None) -> Box:
        """x0, y0, x1, y1 as shares of the picture, on its edge where they are beyond it by no more than rounding.
        canvas: (height, width), needed for pixels."""
        height, width = canvas if canvas is not None and self.pixels else (1, 1)
        x0, y0, x1, y1 = numbers
        if self.sides:
            x1, y1 = x0 + x1, y0 + y1
        slack = PIXEL_SLACK if self.pixels else SHARE_SLACK
        shares = (_on(x0, width, slack), _on(y0, height, slack), _on(x1, width, slack), _on(y1, height, slack))
        return shares[0] / width, shares[1] / height, shares[2] / width, shares[3] / height


XYXY, XYWH = BoxReading(), BoxReading(sides=True)
XYWH_PX = BoxReading(sides=True, pixels=True)


def _on(value: float, edge: float, slack: float) -> float:
    if -slack <= value < 0:
        return 0.0
    return edge if edge < value <= edge + slack else value


def read_box(
    value: Any, where: str, field: str, reading: BoxReading, names: tuple[str, str], canvas: Size | None = None
) -> list[float]:
    """The box as [x0, y0, x1, y1] in [0, 1]. where, field: what errors begin with, and whose value it is.

    names: of the format that has this reading, and of one that has the other order ("" for none). canvas: (height,
    width) of pixels. Raises ValueError naming the value and both readings.
    """
    numbers = four_numbers(value, f"{where}: '{field}' must be four numbers {reading.words}")
    corners = reading.corners(numbers, canvas)
    wrong = fault(corners)
    if wrong is None:
        return list(corners)
    read_as = f"'{field}' {short_repr(value)} is no box read as {names[0]}'s {reading.words}"
    of = "" if canvas is None else f" of a canvas {canvas[1]} wide and {canvas[0]} high"
    raise ValueError(f"{where}: {read_as}{of}: {wrong}; {other_order(numbers, reading, names[1], canvas)}")


def other_order(numbers: Box, reading: BoxReading, name: str = "", canvas: Size | None = None) -> str:
    """In words, what the numbers are in the other order. name: of the format that has it, "" for none."""
    other = replace(reading, sides=not reading.sides)
    corners, order = other.corners(numbers, canvas), f"{name}'s {other.words}" if name else other.words
    if fault(corners) is not None:
        return f"nor is it one as {order}"
    return f"as {order} it would be the box [{', '.join(f'{corner:.6g}' for corner in corners)}] in [0, 1]"


def fault(corners: Box) -> str | None:
    """What keeps [x0, y0, x1, y1] from being a box in [0, 1], in words; None for a box."""
    for name, value in zip(("x0", "y0", "x1", "y1"), corners, strict=True):
        if not 0 <= value <= 1:
            return f"{name} is {value:.6g}, not in [0, 1]"
    for low, high in ((0, 2), (1, 3)):
        if corners[low] >= corners[high]:
            axis = "xy"[low]
            return f"{axis}0 = {corners[low]:.6g} is not below {axis}1 = {corners[high]:.6g}"
    return None


def four_numbers(value: Any, expected: str) -> Box:
    """Raises ValueError that begins with `expected` for anything but a list of four finite numbers."""
    if isinstance(value, list) and len(value) == 4 and all(type(each) in (int, float) for each in value):
        try:
            x, y, z, w = map(float, value)
        except OverflowError:  # an integer of more than 308 digits
            x = y = z = w = math.inf
        if all(map(math.isfinite, (x, y, z, w))):
            return x, y, z, w
    raise ValueError(f"{expected}, got {short_repr(value)}")
