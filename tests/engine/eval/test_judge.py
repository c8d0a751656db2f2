"""Detecting and scoring: perfect, wrong and shuffled pictures give the numbers they must."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.eval.judge import (
    Judge,
    Row,
    Scorer,
    add_percent_of_bound,
    detect,
    result_entries,
    shuffle_layouts,
    without_nan,
)
from engine.eval.profiles import load_profile
from engine.eval.targets import EvalSet, load_eval_set
from models.frozen.detections import Detections
from models.frozen.faster_rcnn import load_detector
from tests.helpers.eval_world import BOXES, ColourDetector, colour_judge, tiny_profile, write_dataset, write_detector
from tests.helpers.tiny import CATEGORIES
from util.boxes import xyxy_to_xywh
from util.distributed import DistInfo
from util.types import Category

ONE = DistInfo(0, 1, 0, torch.device("cpu"))
DISTINCT = [image_id for image_id, boxes in BOXES.items() if len({category for category, _ in boxes}) == len(boxes)]


@pytest.fixture(scope="module")
def eval_set(tmp_path_factory) -> EvalSet:
    """Without the image that has two boxes of one class: the colour detector would find one around both."""
    whole = load_eval_set(write_dataset(tmp_path_factory.mktemp("data") / "coco"), tiny_profile())
    targets = tuple(target for target in whole.targets if target.image_id in DISTINCT)
    return replace(whole, targets=targets)


def found_in_photos(eval_set: EvalSet, batch_size: int = 2) -> list[dict]:
    return detect(colour_judge(), eval_set.targets, eval_set.picture, ONE, batch_size)


@pytest.mark.parametrize("geometry", ["center_crop", "squash"])
def test_pixels_and_boxes_go_the_same_way(geometry, tmp_path):
    """Boxes found in the pixels are the ground truth at output size: AP and mIoU 1."""
    whole = load_eval_set(write_dataset(tmp_path / "coco"), tiny_profile(geometry=geometry))
    targets = tuple(target for target in whole.targets if target.image_id in DISTINCT)
    exact = replace(whole, targets=targets)
    entry, lines = Scorer(exact, 20).score(Row("real images", "bound", (None,), (found_in_photos(exact),)))
    assert entry["conditioned"]["AP"] == pytest.approx({"value": 1.0, "low": 1.0, "high": 1.0})
    assert entry["full"]["AP50"]["value"] == entry["layout"]["mIoU"]["value"] == pytest.approx(1.0)
    assert entry["layout"]["extra_rate"]["value"] == 0.0
    assert [line["mIoU"] for line in lines] == [1.0] * len(targets)
    wanted, detected = (sorted((each["name"], each["box"]) for each in lines[0][key]) for key in ("wanted", "detected"))
    assert wanted == detected


def test_shuffled_layouts_score_nothing(eval_set):
    found = found_in_photos(eval_set)
    shuffled = shuffle_layouts(eval_set.targets, found)
    assert {entry["image_id"] for entry in shuffled} == set(DISTINCT)
    moved = {(entry["category_id"], tuple(entry["bbox"])) for entry in shuffled if entry["image_id"] == DISTINCT[1]}
    assert moved == {(e["category_id"], tuple(e["bbox"])) for e in found if e["image_id"] == DISTINCT[0]}
    entry, _ = Scorer(eval_set, 20).score(Row("shuffled layouts", "control", (0,), (shuffled,)))
    assert entry["conditioned"]["AP50"]["value"] < 0.35
    assert entry["layout"]["SR50"]["value"] < 0.35


def test_seeds_are_means_and_share_resamples(eval_set):
    """One perfect seed and one empty one: 0.5 everywhere, and an interval that is not [0, 1]."""
    found = found_in_photos(eval_set)
    entry, lines = Scorer(eval_set, 50).score(Row("two", "model", (4, 7), (found, [])))
    assert entry["num_seeds"] == 2
    for part, name in (("conditioned", "AP"), ("full", "AP50"), ("layout", "mIoU"), ("layout", "SR50_image")):
        assert entry[part][name] == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5}), (part, name)
    assert [line["seed"] for line in lines] == [4] * len(DISTINCT) + [7] * len(DISTINCT)
    per_class = entry["per_class"]["dog"]
    assert per_class["count"] == 2 and per_class["AP50"] == 0.5 and per_class["mIoU"] == 0.5


def test_percent_of_bound():
    def row(name, kind, value):
        numbers = {key: {"value": value} for key in ("AP", "AP50", "mIoU")}
        return {"name": name, "kind": kind, "conditioned": numbers, "layout": numbers}

    rows = [row("real images", "bound", 0.8), row("VAE round trip", "bound", 0.4), row("model", "model", 0.2)]
    add_percent_of_bound(rows)
    assert rows[0]["percent_of_bound"] is None
    assert rows[1]["percent_of_bound"] == pytest.approx({"AP": 50, "AP50": 50, "mIoU": 50})
    assert rows[2]["percent_of_bound"] == pytest.approx({"AP": 25, "AP50": 25, "mIoU": 25})
    rows = [row("model", "model", 0.2)]
    add_percent_of_bound(rows)
    assert rows[0]["percent_of_bound"] is None
    rows = [row("real images", "bound", 0.0), row("model", "model", 0.2)]
    add_percent_of_bound(rows)
    assert math.isnan(rows[1]["percent_of_bound"]["AP"])


def test_categories_are_mapped_by_name():
    """A detector whose ids differ from the dataset's gives the dataset's ids; its other classes are left out."""
    detector = ColourDetector()
    detector.categories = (Category(5, "cat"), Category(7, "sports ball"), Category(9, "person"), Category(11, "dog"))
    judge = Judge.of(detector, CATEGORIES)
    boxes = torch.tensor([[0.0, 0, 4, 4], [1, 1, 3, 3], [2, 2, 6, 8]])
    found = Detections(boxes, torch.tensor([5, 7, 11]), torch.tensor([0.9, 0.8, 0.7]))
    entries = result_entries(3, found, judge.dataset_id)
    assert [(entry["category_id"], entry["bbox"]) for entry in entries] == [(37, [1, 1, 2, 2]), (18, [2, 2, 4, 6])]


def test_unknown_categories_are_an_error_that_lists_them(tmp_path):
    detector = load_detector(write_detector(tmp_path / "d.pth", [Category(1, "person"), Category(2, "cat")]))
    with pytest.raises(
        ValueError, match="knows 2 categories, but not dog, sports ball of the dataset's 3.*--skip_unknown"
    ):
        Judge.of(detector, CATEGORIES)
    assert Judge.of(detector, CATEGORIES, ["dog", "sports ball"]).dataset_id == {1: 1}


def test_detections_do_not_depend_on_the_number_of_processes(eval_set, monkeypatch):
    alone = found_in_photos(eval_set)
    parts = []
    monkeypatch.setattr("engine.eval.judge.gather_objects", lambda own: parts.append(own) or [own])
    for rank in range(2):
        detect(colour_judge(), eval_set.targets, eval_set.picture, DistInfo(rank, 2, rank, ONE.device), 2)
    monkeypatch.setattr("engine.eval.judge.gather_objects", lambda own: parts)
    assert detect(colour_judge(), eval_set.targets, eval_set.picture, DistInfo(1, 2, 1, ONE.device), 2) == alone
    assert all(parts)


def test_nan_becomes_null():
    assert without_nan({"a": [math.nan, 1.0], "b": (np.nan, {"c": None})}) == {
        "a": [None, 1.0],
        "b": [None, {"c": None}],
    }


@pytest.mark.parametrize("name", ["structmar-256", "coco2017-instdiff", "creati2565", "coco-original"])
def test_perfect_detections_of_real_annotations_score_one(shared, name):
    """COCO's own boxes, through centre crop, squash or as they are: AP and mIoU 1, nothing extra."""
    eval_set = load_eval_set(shared / "data" / "coco_mini", load_profile(name), split="val2017")
    found = [
        {"image_id": target.image_id, "category_id": int(category), "bbox": xyxy_to_xywh(box).tolist(), "score": 0.9}
        for target in eval_set.targets
        for box, category in zip(
            target.boxes_px[target.conditioned], target.category_ids[target.conditioned], strict=True
        )
    ]
    assert len(found) > 100
    entry, _ = Scorer(eval_set, 3).score(Row("perfect", "model", (None,), (found,)))
    assert entry["conditioned"]["AP"]["value"] == pytest.approx(1.0)
    assert entry["layout"]["mIoU"]["value"] == pytest.approx(1.0, abs=1e-6)
    assert (entry["layout"]["SR50_image"]["value"], entry["layout"]["extra_rate"]["value"]) == (1.0, 0.0)
    assert entry["full"]["AP"]["value"] <= 1.0 + 1e-9
