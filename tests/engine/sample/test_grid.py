"""Pictures side by side with their boxes, labels and captions."""

import numpy as np
import pytest
import torch

from engine.data.scenes import Scene, text_scene
from engine.sample.grid import GRID_GAP, _wrap, caption_bands, scene_grid
from util.types import Layout


@pytest.fixture
def scenes() -> list[Scene]:
    boxes = torch.tensor([[0.1, 0.3, 0.5, 0.9], [0.6, 0.1, 0.9, 0.4]])
    scene = Scene("a dog and a ball", Layout(boxes, torch.tensor([1, 2])), ["dog", "sports ball"])
    return [scene, text_scene("a red dog"), text_scene(""), text_scene("a much longer prompt than these")]


def test_grid_shows_boxes_labels_and_captions(scenes):
    images = [np.full((32, 32, 3), 90, dtype=np.uint8)] * 4
    grid = scene_grid(images, scenes, columns=2, scale=4)
    band = caption_bands([scene.prompt for scene in scenes], 128)[0].shape[0]
    assert grid.shape == (2 * (128 + band + GRID_GAP) + GRID_GAP, 2 * (128 + GRID_GAP) + GRID_GAP, 3)
    first = grid[GRID_GAP : GRID_GAP + 128, GRID_GAP : GRID_GAP + 128]
    row, column = round(0.9 * 128), round(0.3 * 128)  # the middle of the dog's lower edge
    assert first[row - 1 : row + 2, column].min() < 30
    assert (first[60, 60] == 90).all()
    second = grid[GRID_GAP : GRID_GAP + 128, 2 * GRID_GAP + 128 : 2 * GRID_GAP + 256]
    assert (second == 90).all()  # a scene without boxes is shown as it is
    assert grid[GRID_GAP + 128 : GRID_GAP + 128 + band, GRID_GAP : GRID_GAP + 128].min() < 60  # the caption


def test_grid_defaults_and_mistakes(scenes):
    images = [np.zeros((100, 100, 3), dtype=np.uint8)] * 3
    grid = scene_grid(images, scenes[:3])
    assert grid.shape[1] == 2 * (300 + GRID_GAP) + GRID_GAP  # enlarged three times, two columns
    with pytest.raises(ValueError, match="got 3 and 2"):
        scene_grid(images, scenes[:2])
    with pytest.raises(ValueError, match="got 0 and 0"):
        scene_grid([], [])


class OnePixelLetters:
    def getlength(self, text: str) -> int:
        return len(text)


@pytest.mark.parametrize(
    ("text", "max_lines", "lines"),
    [
        ("", 4, [""]),
        ("one two", 4, ["one two"]),
        ("one two three four", 4, ["one two", "three four"]),
        ("unbreakableword", 4, ["unbreakabl", "eword"]),
        ("an unbreakableword", 4, ["an", "unbreakabl", "eword"]),
        ("one two three four five six", 2, ["one two", "three f..."]),
    ],
)
def test_captions_are_wrapped(text, max_lines, lines):
    assert _wrap(text, OnePixelLetters(), 10, max_lines) == lines
