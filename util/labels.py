"""Where the labels of boxes go: at their box, inside the picture, and off one another where there is room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Number = TypeVar("Number", int, float)
Corners = tuple[Number, Number, Number, Number]  # x0, y0, x1, y1; y points down


def place_labels(
    boxes: Sequence[Corners[Number]],
    sizes: Sequence[tuple[Number, Number]],
    view: tuple[Number, Number],
    from_below: Sequence[bool] = (),
) -> list[Corners[Number]]:
    """A plate for each box, of its label's size (width, height), in a picture of size `view`.

    A label may lie above its box, below it, or inside at either edge, flush with a side, and is moved into the picture.
    Of these places it takes the first that covers least of earlier labels. from_below: for each box, whether the search
    starts at its lower right corner instead of the upper left one (default: none).
    """
    plates: list[Corners[Number]] = []
    starts = from_below or [False] * len(boxes)
    for (x0, y0, x1, y1), (width, height), is_below in zip(boxes, sizes, starts, strict=True):
        corners = [(x, y) for y in (y0 - height, y0, y1 - height, y1) for x in (x0, x1 - width)]
        places = [_inside(x, y, width, height, view) for x, y in (corners[::-1] if is_below else corners)]
        plates.append(min(places, key=lambda place: sum(overlap(place, other) for other in plates)))
    return plates


def overlap(one: Corners[Number], other: Corners[Number]) -> float:
    """The area that both cover."""
    width, height = min(one[2], other[2]) - max(one[0], other[0]), min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0) * max(height, 0)


def _inside(x: Number, y: Number, width: Number, height: Number, view: tuple[Number, Number]) -> Corners[Number]:
    x, y = max(0, min(x, view[0] - width)), max(0, min(y, view[1] - height))
    return x, y, x + width, y + height
