"""Folders of pictures by class: which label a picture has, what is refused, and that draws are the image's own."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.data.check import check_dataset
from engine.data.classes import ClassBatch, ClassDataset, ClassIndex
from tests.helpers.class_folder import COLORS, NUM_PICTURES, write_class_folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_class_folder(tmp_path / "world")


def dataset(root: Path, crop: str = "center", hflip_prob: float = 0.5, seed: int = 1) -> ClassDataset:
    return ClassDataset(ClassIndex.load(root), 32, crop, hflip_prob, seed)  # type: ignore[arg-type]


def test_labels_count_folders_in_the_order_of_their_names(root: Path) -> None:
    index = ClassIndex.load(root)
    assert index.classes == tuple(sorted(COLORS)) and len(index) == sum(NUM_PICTURES.values())
    for position in range(len(index)):
        assert index.image_path(position).parent.name == index.classes[index.labels[position]]
    assert np.bincount(index.labels).tolist() == [NUM_PICTURES[name] for name in index.classes]
    for sample in map(dataset(root, hflip_prob=0).__getitem__, range(9)):
        right = ((sample.pixels[:, 16, 28] + 1) * 127.5).round()
        assert (right - torch.tensor(COLORS[index.classes[sample.label]])).abs().max() < 12


def test_what_is_no_picture_is_left_out_and_said(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "train" / "n01_plum" / "list.txt").write_text("x")
    (root / "train" / "n02_leaf" / ".hidden.JPEG").write_text("x")
    (root / "train" / "readme.md").write_text("x")
    with caplog.at_level(logging.INFO):
        assert len(ClassIndex.load(root)) == 9
    assert "1 entries are no pictures and left out, n01_plum/list.txt first" in caplog.text


def test_folders_that_are_refused(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"class folder .*nowhere/train not found"):
        ClassIndex.load(root / "nowhere")
    (root / "train" / "n03_empty").mkdir()
    with pytest.raises(ValueError, match=r"class folder .*n03_empty holds no picture"):
        ClassIndex.load(root)
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    with pytest.raises(ValueError, match=r"train holds no folder: each class needs one"):
        ClassIndex.load(root)


def test_the_number_of_classes_is_the_models(root: Path) -> None:
    index = ClassIndex.load(root)
    index.require_class_num(3)
    with pytest.raises(ValueError, match=r"the model has 1000 classes, .*train 3 folders: --class_num 3"):
        index.require_class_num(1000)


@pytest.mark.parametrize("crop", ["center", "random"])
def test_crops_and_flips_are_the_images_own(root: Path, crop: str) -> None:
    """Whatever was read before; other ones in another epoch."""
    one, other = dataset(root, crop), dataset(root, crop)
    forwards = [one[item].pixels for item in range(9)]
    backwards = [other[item].pixels for item in reversed(range(9))]
    assert all(torch.equal(a, b) for a, b in zip(forwards, reversed(backwards), strict=True))
    one.set_epoch(1)
    assert any(not torch.equal(one[item].pixels, forwards[item]) for item in range(9))
    always, never = dataset(root, hflip_prob=1), dataset(root, hflip_prob=0)
    assert torch.equal(always[5].pixels, never[5].pixels.flip(-1))


def test_a_batch_keeps_labels_with_pictures(root: Path) -> None:
    samples = [dataset(root)[item] for item in (8, 0, 5)]
    batch = ClassBatch.collate(samples)
    assert batch.image_ids == [8, 0, 5] and batch.labels.tolist() == [2, 0, 1] and len(batch) == 3
    assert batch.pixels is not None and torch.equal(batch.pixels[1], samples[1].pixels)


def test_every_picture_is_looked_at_until_it_was(root: Path, tmp_path: Path) -> None:
    found = check_dataset(dataset(root), tmp_path)
    assert found.summary[1] == "9 pictures are there and whole"
    assert "train: 9 pictures of 3 classes" in found.summary[0]
    found.remember(tmp_path)
    assert "as they were when checked before" in check_dataset(dataset(root), tmp_path).summary[1]
    path = ClassIndex.load(root).image_path(6)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=rf"cannot read image .*{path.name}: .*truncated"):
        check_dataset(dataset(root), tmp_path)
