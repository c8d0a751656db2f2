"""Labels lie inside the picture, at their box, and on no other label while one of their places is free."""

from __future__ import annotations

import numpy as np
import pytest

from util.labels import Corners, overlap, place_labels


def test_places_by_hand() -> None:
    box = (20, 20, 60, 50)
    size, view = (10, 5), (100, 100)
    assert place_labels([box] * 5, [size] * 5, view) == [
        (20, 15, 30, 20), (50, 15, 60, 20), (20, 20, 30, 25), (50, 20, 60, 25), (20, 45, 30, 50),
    ]  # fmt: skip
    assert place_labels([box], [size], view, [True]) == [(50, 50, 60, 55)]
    assert place_labels([(0, 0, 100, 100)], [size], view) == [(0, 0, 10, 5)]  # no room above
    assert place_labels([(95, 98, 100, 100)], [size], view, [True]) == [(90, 95, 100, 100)]


def test_overlap_is_an_area() -> None:
    assert overlap((0, 0, 4, 4), (2, 3, 9, 9)) == 2
    assert overlap((0, 0, 4, 4), (4, 0, 8, 4)) == overlap((0, 0, 1, 1), (5, 5, 6, 6)) == 0


@pytest.mark.parametrize("seed", range(20))
def test_labels_avoid_each_other(seed: int) -> None:
    """Whoever is alone at a place that stays free gets it; nobody leaves the picture or its own box."""
    draw, view = np.random.default_rng(seed), (200.0, 120.0)
    corners = draw.uniform(0, [160, 90], (12, 2))
    boxes = [tuple(row) for row in np.concatenate([corners, corners + draw.uniform(5, 40, (12, 2))], axis=1).tolist()]
    sizes = [(width, 10.0) for width in draw.uniform(10, 60, 12).tolist()]
    lower = draw.integers(0, 2, 12).astype(bool).tolist()
    plates = place_labels(boxes, sizes, view, lower)
    assert [(x1 - x0, y1 - y0) for x0, y0, x1, y1 in plates] == [pytest.approx(size) for size in sizes]
    for index, (plate, box) in enumerate(zip(plates, boxes, strict=True)):
        x0, y0, x1, y1 = plate
        assert x0 >= 0 and y0 >= 0 and x1 <= view[0] + 1e-9 and y1 <= view[1] + 1e-9
        reach: Corners[float] = (box[0] - 60, box[1] - 20, box[2] + 60, box[3] + 20)
        assert overlap(plate, reach) == pytest.approx((x1 - x0) * (y1 - y0))
        alone = place_labels([box], [sizes[index]], view, [lower[index]])[0]
        if not any(overlap(alone, other) for other in plates[:index]):
            assert plate == alone
