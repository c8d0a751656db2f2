"""The parts of the layout reward by hand, exploits that must not pay, weights and settings."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from engine.rl.rewards import (
    MAX_EXTRA,
    PARTS,
    layout_verdict,
    total_reward,
)
from engine.rl.settings import RewardSettings, RewardWeights

CAT, DOG, BIRD = 3, 17, 20
Box = tuple[int, list[float]]  # category id, xyxy
Found = tuple[int, list[float], float]  # and score

A, B = [0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]
SQUARE = (1.0, 1.0)
GONE = {"iou": 0.0, "confidence": 0.0, "centroid": 0.0, "miss": 1.0, "extra": 0.0}


def parts(
    wanted: Sequence[Box],
    found: Sequence[Found],
    settings: RewardSettings | None = None,
    aspect: tuple[float, float] = SQUARE,
) -> dict[str, float]:
    return layout_verdict(
        np.array([box for _, box in wanted], dtype=np.float64).reshape(-1, 4),
        np.array([category for category, _ in wanted], dtype=np.int64),
        np.array([box for _, box, _ in found], dtype=np.float64).reshape(-1, 4),
        np.array([category for category, _, _ in found], dtype=np.int64),
        np.array([score for _, _, score in found], dtype=np.float64),
        RewardSettings() if settings is None else settings,
        aspect,
    ).parts


def total(wanted: Sequence[Box], found: Sequence[Found]) -> float:
    row = {name: np.array([value]) for name, value in parts(wanted, found).items()}
    return float(total_reward(row, RewardWeights())[0])


# ---- parts by hand


def test_perfect_boxes() -> None:
    found = parts([(CAT, A), (DOG, B)], [(DOG, B, 0.8), (CAT, A, 1.0)])
    assert found == pytest.approx({"iou": 1, "confidence": 0.9, "centroid": 1, "miss": 0, "extra": 0})
    assert total([(CAT, A), (DOG, B)], [(DOG, B, 0.8), (CAT, A, 1.0)]) == pytest.approx(1 + 0.2 * 0.9 + 0.2)


def test_shifted_box() -> None:
    found = parts([(CAT, A)], [(CAT, [0.25, 0.0, 0.75, 0.5], 0.6)])  # shares half of each
    centroid = 1 - 0.25 / math.sqrt(2)
    assert found == pytest.approx({"iou": 1 / 3, "confidence": 0.6, "centroid": centroid, "miss": 0, "extra": 0})


def test_distances_follow_the_shape_of_the_picture() -> None:
    wide = parts([(CAT, A)], [(CAT, [0.25, 0.0, 0.75, 0.5], 0.6)], aspect=(400, 300))  # 100 px of a diagonal of 500
    assert wide["centroid"] == pytest.approx(0.8) and wide["iou"] == pytest.approx(1 / 3)


def test_low_score_counts_in_part() -> None:
    found = parts([(CAT, A)], [(CAT, A, 0.2)])  # presence .2 / .5
    assert found == pytest.approx({"iou": 0.4, "confidence": 0.2, "centroid": 0.4, "miss": 0.6, "extra": 0})
    assert parts([(CAT, A)], [(CAT, A, 0.049)]) == GONE  # below min_score
    assert parts([(CAT, A)], [(CAT, A, 0.05)])["iou"] == pytest.approx(0.1)
    assert parts([(CAT, A)], [(CAT, A, 0.5)])["iou"] == parts([(CAT, A)], [(CAT, A, 0.9)])["iou"] == 1


def test_wrong_class_and_no_detection() -> None:
    assert parts([(CAT, A)], []) == GONE
    assert parts([(CAT, A)], [(DOG, A, 0.9)]) == GONE | {"extra": 1.0}
    assert parts([(CAT, A)], [(DOG, A, 0.1)]) == pytest.approx(GONE | {"extra": 0.2})
    assert total([(CAT, A)], []) == pytest.approx(-0.1)
    assert total([(CAT, A)], [(DOG, A, 0.9)]) == pytest.approx(-0.15)


def test_extras_are_counted_per_wanted_box_up_to_a_bound() -> None:
    wanted: list[Box] = [(CAT, A), (DOG, B)]
    perfect: list[Found] = [(CAT, A, 0.9), (DOG, B, 0.9)]
    assert parts(wanted, [*perfect, (CAT, B, 0.9), (BIRD, B, 0.25), (DOG, A, 0.5)])["extra"] == pytest.approx(2.5 / 2)
    assert parts(wanted, [*perfect, *[(BIRD, A, 0.9)] * 100])["extra"] == MAX_EXTRA
    assert parts(wanted, [*perfect, *[(BIRD, A, 0.9)] * 19])["extra"] == 9.5


def test_iou_floor() -> None:
    corner = [0.0, 0.0, 0.25, 0.2]  # IoU .2
    assert parts([(CAT, A)], [(CAT, corner, 0.9)])["iou"] == pytest.approx(0.2)
    high = parts([(CAT, A)], [(CAT, corner, 0.9)], RewardSettings(iou_floor=0.21))
    assert high == GONE | {"extra": 1.0}
    beside = parts([(CAT, A)], [(CAT, B, 0.9)], RewardSettings(iou_floor=0.0))  # touching is no overlap
    assert beside == GONE | {"extra": 1.0}


def test_one_partner_each_and_the_largest_total() -> None:
    """Greedy by IoU would give the left object the middle box (IoU 7/13) and leave the right one alone."""
    left, right = [0.0, 0.0, 0.5, 1.0], [0.3, 0.0, 0.8, 1.0]
    middle, outer = [0.15, 0.0, 0.65, 1.0], [0.0, 0.0, 0.25, 1.0]  # outer: IoU 1/2 with left only
    found = parts([(CAT, left), (CAT, right)], [(CAT, middle, 0.9), (CAT, outer, 0.9)])
    assert found["iou"] == pytest.approx((0.5 + 0.35 / 0.65) / 2) and found["miss"] == found["extra"] == 0


def test_presence_decides_between_overlaps_and_score_between_ties() -> None:
    half = [0.0, 0.0, 0.25, 0.5]
    found = parts([(CAT, A)], [(CAT, A, 0.2), (CAT, half, 0.5)])  # .4 * 1 < 1 * .5
    assert (found["iou"], found["confidence"], found["extra"]) == pytest.approx((0.5, 0.5, 0.4))
    assert parts([(CAT, A)], [(CAT, A, 0.6), (CAT, A, 0.95)])["confidence"] == 0.95


def test_the_order_of_boxes_does_not_matter() -> None:
    draws = np.random.default_rng(0)

    def boxes(count: int) -> np.ndarray:
        corners = np.sort(draws.choice([0.0, 0.3, 0.4, 0.6, 1.0], (count, 2, 2), p=[0.3, 0.2, 0.2, 0.1, 0.2]), axis=1)
        return np.concatenate([corners[:, 0], corners[:, 1] + 0.1], axis=1)

    for _ in range(30):  # of few values, so that ties are frequent
        wanted, found = boxes(5), boxes(9)
        wanted_ids, found_ids = draws.integers(1, 3, 5), draws.integers(1, 3, 9)
        scores = draws.choice([0.03, 0.3, 0.7, 0.9], 9)
        first = layout_verdict(wanted, wanted_ids, found, found_ids, scores, RewardSettings(), (4, 3)).parts
        p, q = draws.permutation(5), draws.permutation(9)
        again = layout_verdict(
            wanted[p], wanted_ids[p], found[q], found_ids[q], scores[q], RewardSettings(), (4, 3)
        ).parts
        assert first == again  # to the last bit


# ---- exploits


WANTED: list[Box] = [
    (CAT, [0.05, 0.1, 0.45, 0.5]),
    (CAT, [0.1, 0.15, 0.5, 0.55]),
    (DOG, [0.55, 0.5, 0.95, 0.9]),
    (BIRD, [0.6, 0.05, 0.9, 0.3]),
]
HONEST: list[Found] = [(category, box, 0.8) for category, box in WANTED[1:3]]  # half of the objects, well drawn


def grid(cells: int, classes: Sequence[int] = (CAT, DOG, BIRD)) -> list[Found]:
    side = 1 / cells
    corners = [(x * side, y * side) for x in range(cells) for y in range(cells)]
    return [(category, [x, y, x + side, y + side], 0.99) for x, y in corners for category in classes]


EXPLOITS: dict[str, list[Found]] = {
    "empty": [],
    "far wrong class": [(BIRD, [0.0, 0.9, 0.1, 1.0], 0.99)],
    "far right class": [(DOG, [0.0, 0.0, 0.3, 0.3], 0.99)],
    "right class below the floor": [(DOG, [0.9, 0.8, 1.0, 1.0], 0.99)],
    "wrong class in place": [(BIRD, box, 0.99) for _, box in WANTED[:3]],
    "one box for two cats": [(CAT, [0.05, 0.1, 0.5, 0.55], 0.99)],
    "one box of the whole picture per class": [(each, [0.0, 0.0, 1.0, 1.0], 0.99) for each in (CAT, DOG, BIRD)],
    "many of one class": [(CAT, [x / 20, y / 20, x / 20 + 0.4, y / 20 + 0.4], 0.99) for x in range(12) for y in (0, 9)],
    "coarse grid of all classes": grid(2),
    "grid of all classes": grid(3),
    "fine grid of all classes": grid(5),
    "whispers everywhere": [(each, box, 0.05) for each, box, _ in grid(3)],
}


@pytest.mark.parametrize("name", EXPLOITS)
def test_exploits_score_below_an_honest_half(name: str) -> None:
    honest = total(WANTED, HONEST)
    assert honest == pytest.approx((1 + 0.2 * 0.8 + 0.2) / 2 - 0.1 / 2)
    assert total(WANTED, EXPLOITS[name]) < honest - 0.05


def test_a_box_cannot_be_claimed_twice() -> None:
    twins: list[Box] = [(CAT, A), (CAT, A)]
    found = parts(twins, [(CAT, A, 0.9)])
    assert found == pytest.approx({"iou": 0.5, "confidence": 0.45, "centroid": 0.5, "miss": 0.5, "extra": 0})


def test_duplicates_only_cost() -> None:
    assert total([(CAT, A)], [(CAT, A, 0.9)] * 3) == pytest.approx(total([(CAT, A)], [(CAT, A, 0.9)]) - 0.1)


# ---- weights, settings, wrong input


def test_total_is_the_weighted_sum() -> None:
    row = {name: np.array([value, 0.0]) for name, value in zip(PARTS, (0.5, 0.4, 0.3, 0.2, 3.0), strict=True)}
    weights = RewardWeights(iou=2, confidence=3, centroid=5, miss=7, extra=0.5, quality=4)
    expected = 1.0 + 1.2 + 1.5 - 1.4 - 1.5
    np.testing.assert_allclose(total_reward(row, weights), [expected, 0.0])
    with_quality = row | {"quality": np.array([0.25, 0.5])}
    np.testing.assert_allclose(total_reward(with_quality, weights), [expected + 1, 2])


def test_weights_that_are_all_zero_teach_nothing() -> None:
    with pytest.raises(ValueError, match="all reward weights are 0"):
        RewardWeights(0, 0, 0, 0, 0, 0)


def test_parts_refuse() -> None:
    with pytest.raises(ValueError, match="at least one wanted box, got none"):
        parts([], [(CAT, A, 0.9)])
    with pytest.raises(ValueError, match=r"scores must be .*1\.5"):
        parts([(CAT, A)], [(CAT, A, 1.5)])
    with pytest.raises(ValueError, match="scores must be .*nan"):
        parts([(CAT, A)], [(CAT, A, math.nan)])
    with pytest.raises(ValueError, match="detected boxes must be finite"):
        parts([(CAT, A)], [(CAT, [0.0, 0.0, math.inf, 1.0], 0.9)])
    with pytest.raises(ValueError, match=r"wanted boxes must be \[k, 4\] .* \(1, 3\)"):
        layout_verdict(
            np.zeros((1, 3)), np.ones(1), np.zeros((0, 4)), np.zeros(0), np.zeros(0), RewardSettings(), SQUARE
        )
