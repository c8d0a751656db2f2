"""How pictures of planned layouts are counted, and what the committed planner proposes for captions it never saw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engine.data.scenes import KnownLabels, Scene, scenes_from_dataset, text_scene
from engine.eval.layout_scores import score_layouts
from engine.plan.propose import LayoutPlanner, layout_generators
from models.frozen.detections import Detections
from models.frozen.text import ClipTextEncoder
from scripts.mini.dataset import DatasetSettings, make_dataset
from scripts.mini.planned import Counts, count, in_unit_square, result_row, with_boxes_of_others
from tests.conftest import ROOT
from util.coco import BoxFilters, CocoIndex
from util.rng import generator
from util.types import Layout

NAMES = {1: "dog", 2: "cat"}
LEFT, RIGHT = [0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]
MINI = ROOT / "pretrained_models" / "mini"


def scene(*objects: tuple[str, list[float]]) -> Scene:
    if not objects:
        return text_scene("a caption")
    boxes, labels = torch.tensor([box for _, box in objects]), [label for label, _ in objects]
    return Scene("a caption", Layout(boxes, torch.tensor([{"dog": 0, "cat": 1}[label] for label in labels])), labels)


def finds(*objects: tuple[int, list[float]]) -> Detections:
    boxes = torch.tensor([box for _, box in objects]).reshape(-1, 4)
    return Detections(boxes, torch.tensor([each for each, _ in objects], dtype=torch.int64), torch.ones(len(objects)))


def test_finds_count_once_and_boxes_by_class_and_place() -> None:
    asked = scene(("dog", LEFT), ("dog", RIGHT), ("cat", LEFT))
    found = finds((1, LEFT), (1, LEFT), (2, RIGHT))
    assert count(["dog", "cat", "cat"], asked, found, NAMES) == Counts(3, 2, 1, 3, 1)
    assert count(["dog"], scene(), finds(), NAMES) == Counts(1, 0, 0, 0, 0)
    assert count(["dog"], scene(), finds((1, RIGHT)), NAMES) == Counts(1, 1, 0, 0, 0)


def test_finds_are_shares_of_the_picture_and_confident() -> None:
    found = Detections(torch.tensor([[0.0, 0, 20, 10], [0, 0, 9, 9]]), torch.tensor([1, 2]), torch.tensor([0.9, 0.1]))
    kept = in_unit_square(found, np.zeros((10, 40, 3), np.uint8), 0.3)
    assert kept.boxes_px.tolist() == [[0, 0, 0.5, 1]] and kept.category_ids.tolist() == [1]


def test_other_scenes_lend_boxes_not_classes() -> None:
    scenes = [scene(("dog", LEFT)), scene(("dog", LEFT), ("cat", RIGHT)), scene(("cat", RIGHT))]
    moved = with_boxes_of_others(scenes)
    assert [each.names for each in moved] == [each.names for each in scenes]
    assert [each.layout.boxes_xyxy.tolist() for each in moved] == [[RIGHT], [LEFT, RIGHT], [LEFT]]


def test_shares_are_of_all_scenes_together() -> None:
    counts = [Counts(1, 1, 0, 2, 1), Counts(3, 1, 2, 2, 2)]
    row = result_row(counts, np.array([[1, 1], [2, 0], [0, 2]]))
    assert row["recall"]["value"] == 0.5 and row["placed"]["value"] == 0.75 and row["extra"] == 1
    assert row["recall"]["low"] < 0.5 < row["recall"]["high"]


def test_the_committed_planner_beats_shuffled_captions_by_far(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    make_dataset(tmp_path, DatasetSettings(num_train=1, num_val=12, seed=77))
    index = CocoIndex.load(tmp_path, "val2017", BoxFilters(0.002, max_objects=8), 64)
    scenes = scenes_from_dataset(index, 64, 12)
    planner = LayoutPlanner.load(MINI / "planner_mini.safetensors")
    encoder = ClipTextEncoder.load(MINI / "clip-text-mini")
    known = KnownLabels(index.categories, 8)
    planner.require_fitting(known, encoder.id)
    draws = layout_generators([generator("test", row) for row in range(len(scenes))])
    planned = [each.layout for each in planner.scenes([text_scene(s.prompt) for s in scenes], known, encoder, draws)]
    real = [each.layout for each in scenes]
    own, shuffled = score_layouts(planned, real), score_layouts(planned[1:] + planned[:1], real)
    assert own.class_f1 > 0.9 > 0.4 > shuffled.class_f1
    assert own.count_accuracy > shuffled.count_accuracy + 0.3
    assert pytest.approx(own.overlap) == shuffled.overlap
