"""A detector's boxes beside those that were asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.data.scenes import Scene
from engine.page.found import look
from models.frozen.detections import Detections
from util.types import Category, Layout


class Seer:
    """Sees the same everywhere: a dog at the left half, a doubtful ball, another dog."""

    id, arch = "", "fixed"
    categories = (Category(18, "dog"), Category(37, "sports ball"))

    def __call__(self, images: Sequence[Tensor]) -> list[Detections]:
        boxes = torch.tensor([[0.0, 0, 10, 20], [0, 0, 5, 5], [20, 0, 40, 20]])
        return [Detections(boxes, torch.tensor([18, 37, 18]), torch.tensor([0.9, 0.4, 0.6])) for _ in images]


def test_each_object_has_the_iou_of_its_partner() -> None:
    boxes = torch.tensor([[0, 0, 0.5, 1], [0.5, 0, 1, 1], [0, 0, 0.1, 0.1], [0, 0, 1, 1]])
    layout = Layout(boxes, torch.tensor([1, 1, 2, 0]))
    scene = Scene("", layout, ["dog", "dog", "sports ball", "person"])
    seen = look(Seer(), np.zeros((20, 40, 3), np.uint8), scene, torch.device("cpu"))
    assert seen["ious"] == [0.5, 1.0, 0.0, None]
    assert seen["found"] == [
        {"label": "dog", "bbox": [0.0, 0.0, 0.25, 1.0], "score": 0.9},
        {"label": "dog", "bbox": [0.5, 0.0, 1.0, 1.0], "score": 0.6},
    ]


def test_without_boxes_and_without_finds() -> None:
    scene = Scene("", Layout(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)), [])
    assert look(Seer(), np.zeros((20, 40, 3), np.uint8), scene, torch.device("cpu"))["ious"] == []
