"""The rollout grid: which boxes are drawn, where and in which colour, and how groups are laid out."""

import numpy as np
import pytest
import torch

from engine.data.scenes import Scene, text_scene
from engine.rl.rollout_grid import DETECTED, UNSURE, WANTED, draw_sample, rollout_grid
from engine.sample.grid import GRID_GAP
from models.frozen.detections import Detections
from util.types import Category, Layout

CATEGORIES = (Category(1, "person"), Category(18, "dog"))
GREY = np.full((64, 64, 3), 128, dtype=np.uint8)
SCENE = Scene("a dog", Layout(torch.tensor([[0.25, 0.5, 0.5, 0.75]]), torch.tensor([1])), ["dog"])
NAMES = {category.id: category.name for category in CATEGORIES}


def found(*rows: tuple[list[float], int, float]) -> Detections:
    return Detections(
        torch.tensor([box for box, _, _ in rows]).reshape(-1, 4),
        torch.tensor([category for _, category, _ in rows], dtype=torch.int64),
        torch.tensor([score for _, _, score in rows]),
    )


def has(picture: np.ndarray, color: tuple[int, int, int]) -> bool:
    return bool((picture == color).all(-1).any())


def test_boxes_are_drawn_at_their_place_in_their_colour():
    dog = found(([32.0, 8.0, 60.0, 24.0], 18, 0.9))
    picture = draw_sample(GREY, SCENE, dog, NAMES, 0.05, scale=4)
    assert picture.shape == (256, 256, 3) and picture.dtype == np.uint8
    assert tuple(picture[160, 64]) == WANTED  # left edge: .25 * 256, between .5 and .75 of the height
    assert tuple(picture[160, 128]) == WANTED
    assert tuple(picture[64, 128]) == DETECTED  # left edge: 32 * 4
    assert tuple(picture[32, 200]) == DETECTED  # upper edge: 8 * 4
    assert tuple(picture[240, 240]) == (128, 128, 128)
    assert (GREY == 128).all()


def test_scores_below_the_bound_are_not_drawn_and_unsure_ones_are_pale():
    box = [32.0, 8.0, 60.0, 24.0]
    draw = {score: draw_sample(GREY, SCENE, found((box, 18, score)), NAMES, 0.05, 4) for score in (0.04, 0.1, 0.3)}
    assert [has(draw[score], DETECTED) for score in (0.04, 0.1, 0.3)] == [False, False, True]
    assert [has(draw[score], UNSURE) for score in (0.04, 0.1, 0.3)] == [False, True, False]


def test_nothing_found_nothing_wanted_and_boxes_beyond_the_edge():
    assert (draw_sample(GREY, text_scene(""), found(), NAMES, 0.05, 1) == GREY).all()
    outside = found(([-9.0, -9.0, 80.0, 80.0], 1, 1.0), ([63.9, 63.9, 64.0, 64.0], 1, 1.0))
    picture = draw_sample(GREY, text_scene(""), outside, NAMES, 0.05, 4)
    assert tuple(picture[100, 0]) == DETECTED and tuple(picture[100, 255]) == DETECTED


def test_a_row_per_group_and_a_column_per_sample():
    scenes = [SCENE] * 3 + [text_scene("a person")] * 3
    shades = [np.full((64, 64, 3), 10 * number, dtype=np.uint8) for number in range(1, 7)]
    grid = rollout_grid(shades, scenes, [found()] * 6, [0.5] * 6, CATEGORIES, 0.05, group_size=3)
    assert grid.shape[1] == 3 * (256 + GRID_GAP) + GRID_GAP
    for number in range(6):
        rows, columns = np.nonzero((grid == 10 * (number + 1)).all(-1))
        assert len(rows) > 0.5 * 256**2
        left = GRID_GAP + number % 3 * (256 + GRID_GAP)
        assert np.median(columns) == pytest.approx(left + 127.5, abs=8)
        assert (np.median(rows) > grid.shape[0] / 2) == (number >= 3)


def test_caption_and_reward_are_written():
    def grid(prompt: str, reward: float) -> np.ndarray:
        return rollout_grid([GREY], [text_scene(prompt)], [found()], [reward], CATEGORIES, 0.05, 1)

    base = grid("a dog", 0.5)
    by_caption = (grid("a fox", 0.5) != base).any((1, 2)).nonzero()[0]
    by_reward = (grid("a dog", 0.7) != base).any((1, 2)).nonzero()[0]
    assert len(by_caption) > 0 and by_caption.max() < base.shape[0] - 256
    assert len(by_reward) > 0 and by_reward.min() > 256


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="2 images, 1 scenes, 1 detections, 1 rewards"):
        rollout_grid([GREY] * 2, [SCENE], [found()], [0.0], CATEGORIES, 0.05, 1)
    with pytest.raises(ValueError, match="0 images"):
        rollout_grid([], [], [], [], CATEGORIES, 0.05, 1)
    with pytest.raises(ValueError, match="3 images .* groups of 2"):
        rollout_grid([GREY] * 3, [SCENE] * 3, [found()] * 3, [0.0] * 3, CATEGORIES, 0.05, 2)
    with pytest.raises(ValueError, match="image 0 on mixes captions"):
        rollout_grid([GREY] * 2, [SCENE, text_scene("b")], [found()] * 2, [0.0] * 2, CATEGORIES, 0.05, 2)
    with pytest.raises(ValueError, match="category id 7"):
        draw_sample(GREY, SCENE, found(([1.0, 1.0, 9.0, 9.0], 7, 0.9)), NAMES, 0.05, 1)
