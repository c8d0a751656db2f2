"""Scores of layouts, against values computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from engine.eval.layout_scores import alignment, layout_distance, overlap, paired_ious, score_layouts
from engine.plan.matches import class_f1
from util.types import Layout

DOG, CAT, CAR = 0, 1, 2


def layout(*boxes: tuple[int, list[float]]) -> Layout:
    if not boxes:
        return Layout(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    return Layout(torch.tensor([box for _, box in boxes]).float(), torch.tensor([category for category, _ in boxes]))


def of_classes(*categories: int) -> Layout:
    return layout(*((category, [0.1, 0.1, 0.5, 0.5]) for category in categories))


A, B = [0.0, 0.0, 0.5, 0.5], [0.25, 0.0, 0.75, 0.5]


def test_class_f1_is_micro_over_smaller_counts() -> None:
    assert class_f1([of_classes(DOG, DOG, CAT)], [of_classes(DOG, CAT, CAR)]) == pytest.approx(2 / 3)
    two = class_f1([of_classes(DOG, DOG, CAT), of_classes(CAR)], [of_classes(DOG, CAT, CAR), of_classes(CAR)])
    assert two == pytest.approx(2 * 3 / 8)  # counts add up before they are divided
    assert math.isnan(class_f1([of_classes()], [of_classes()]))


def test_iou_and_overlap_of_two_shifted_boxes() -> None:
    assert paired_ious(layout((DOG, A)), layout((DOG, B))) == pytest.approx([1 / 3])
    assert overlap(np.array([A, B])) == pytest.approx(0.5)
    assert overlap(np.array([A])) == 0 and math.isnan(overlap(np.zeros((0, 4))))


def test_boxes_are_paired_within_a_class_and_misses_are_zero() -> None:
    far = [0.6, 0.6, 0.9, 0.9]
    real = layout((DOG, A), (DOG, far), (CAT, A))
    assert paired_ious(layout((DOG, far), (CAR, A)), real) == pytest.approx([0, 1, 0])
    assert paired_ious(layout((DOG, far), (DOG, B)), real) == pytest.approx([1 / 3, 1, 0])
    assert paired_ious(layout(), real).tolist() == [0, 0, 0]


def test_alignment_is_the_smallest_gap_of_like_lines() -> None:
    first = [0.1, 0.1, 0.3, 0.3]
    assert alignment(np.array([first, [0.1, 0.5, 0.4, 0.9]])) == pytest.approx(0)
    assert alignment(np.array([first, [0.15, 0.5, 0.45, 0.9]])) == pytest.approx(0.0513, abs=1e-4)
    assert math.isnan(alignment(np.array([first])))


def test_the_distance_of_layouts_is_zero_for_the_same_and_grows_with_a_shift() -> None:
    draws = np.random.default_rng(0)
    sets = []
    for shift in (0.0, 0.1, 0.3):
        corners = draws.uniform(0.05, 0.3, (200, 2))
        sets.append([layout((DOG, [x + shift, y, x + shift + 0.2, y + 0.2])) for x, y in corners])
    same, near, far = (layout_distance(each, sets[0]) for each in sets)
    assert same == pytest.approx(0, abs=1e-6) and same < near < far


def test_real_layouts_score_perfectly_and_shuffled_ones_do_not() -> None:
    real = [layout((DOG, A), (CAT, B)), layout((CAR, A)), layout()]
    best, worst = score_layouts(real, real), score_layouts(real[1:] + real[:1], real)
    assert (best.class_f1, best.count_accuracy, best.miou) == (1, 1, pytest.approx(1))
    assert worst.class_f1 == worst.miou == worst.count_accuracy == 0
    assert best.overlap == worst.overlap  # of the proposed layouts alone


def test_layouts_are_compared_one_to_one() -> None:
    with pytest.raises(ValueError, match="got 1 proposed and 2 real ones"):
        score_layouts([layout()], [layout(), layout()])
