"""Bounds that evaluations share: taken where everything they depend on is the same, never otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.eval.bounds import BoundStore, bound_identity
from engine.eval.judge import detect
from engine.eval.targets import EvalSet, load_eval_set
from tests.helpers.eval_world import colour_judge, tiny_profile, write_dataset
from util.distributed import DistInfo

ONE = DistInfo(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def eval_set(tmp_path) -> EvalSet:
    return load_eval_set(write_dataset(tmp_path / "coco"), tiny_profile())


def detections(store: BoundStore, eval_set: EvalSet, row: str = "real images", **made_of: str) -> tuple[list, bool]:
    """The bound's detections, and whether they had to be made."""
    judge, made = colour_judge(), []

    def detect_all() -> list:
        made.append(True)
        return detect(judge, eval_set.targets, eval_set.picture, ONE, 4)

    identity = bound_identity(row, eval_set, judge, made_of, ONE.device)
    ids = [target.image_id for target in eval_set.targets]
    return store.detections(identity, ids, detect_all, ONE), bool(made)


def repaint(eval_set: EvalSet) -> None:
    """Other photographs under the same names."""
    first, second = (eval_set.root / eval_set.split / target.file_name for target in eval_set.targets[:2])
    first.write_bytes(second.read_bytes())


def test_the_same_bound_is_detected_once(eval_set, tmp_path):
    store = BoundStore(tmp_path / "bounds")
    wanted, is_new = detections(store, eval_set)
    assert is_new and len(wanted) > 0
    assert detections(store, eval_set) == (wanted, False)
    assert len(list(store.folder.iterdir())) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda each: replace(each, profile=tiny_profile(nms_iou=0.4)),
        lambda each: replace(each, targets=each.targets[1:]),
        lambda each: repaint(each) or each,
    ],
    ids=["profile", "images", "photographs"],
)
def test_another_bound_is_not_taken(eval_set, tmp_path, change: Callable[[EvalSet], EvalSet]):
    store = BoundStore(tmp_path / "bounds")
    detections(store, eval_set)
    changed = change(eval_set)
    _, is_new = detections(store, changed)
    assert is_new
    assert not detections(store, changed)[1]


def test_rows_and_vaes_are_apart(eval_set, tmp_path):
    store = BoundStore(tmp_path / "bounds")
    assert detections(store, eval_set)[1]
    assert detections(store, eval_set, "VAE round trip", vae="a")[1]
    assert detections(store, eval_set, "VAE round trip", vae="b")[1]
    assert not detections(store, eval_set, "VAE round trip", vae="a")[1]


def cut(path: Path) -> None:
    path.write_text(path.read_text()[:-40])


def move_a_box(path: Path) -> None:
    content = json.loads(path.read_text())
    content["detections"][0]["bbox"][0] += 1
    path.write_text(json.dumps(content))


def take_anothers(path: Path) -> None:
    content = json.loads(path.read_text())
    content["identity"]["profile"] = "0" * 12
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("damage", [cut, move_a_box, take_anothers, lambda path: path.write_text("[]")])
def test_a_file_that_does_not_fit_is_said_and_replaced(eval_set, tmp_path, caplog, damage):
    store = BoundStore(tmp_path / "bounds")
    wanted, _ = detections(store, eval_set)
    damage(next(store.folder.iterdir()))
    assert detections(store, eval_set) == (wanted, True)
    assert "the bound is detected anew" in caplog.text
    assert detections(store, eval_set) == (wanted, False)
