"""The stand-in for CLIP where only annotations are at hand: what it learns from, and that it goes on when killed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.frozen.text import ClipTextEncoder
from scripts.mini import text_training, train_text
from tests.helpers.coco_fixture import DEFAULT_IMAGES, write_coco
from util.coco import CocoIndex


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_coco(tmp_path_factory.mktemp("coco"), "val2017", DEFAULT_IMAGES)
    (root / "val2017").rename(root / "moved")  # no pixel is read
    return root


def train(root: Path, output: Path, *flags: str) -> ClipTextEncoder:
    sizes = ["--width", "16", "--depth", "1", "--min_count", "1", "--batch_size", "2", "--warmup", "1"]
    often = ["--save_freq", "2", "--log_freq", "2"]
    train_text.main(["--data", str(root), "--output", str(output), *sizes, *often, *flags])
    return ClipTextEncoder.load(output)


def test_a_run_that_was_killed_goes_on_as_if_it_had_not(root: Path, tmp_path: Path, monkeypatch) -> None:
    whole = train(root, tmp_path / "whole", "--steps", "5")
    saved = text_training.save_state

    def killed(*args, **parts) -> None:
        saved(*args, **parts)
        raise KeyboardInterrupt

    monkeypatch.setattr(text_training, "save_state", killed)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(root, tmp_path / "cut", "--steps", "5")
    monkeypatch.undo()
    assert not (tmp_path / "cut").exists()
    found = train(root, tmp_path / "cut", "--steps", "5")
    assert all(torch.equal(tensor, found.model.state_dict()[name]) for name, tensor in whole.model.state_dict().items())
    assert found.id == whole.id


def test_it_learns_the_classes_of_boxes_and_is_made_once(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = CocoIndex.load(root, "val2017")
    data = text_training.Labelled.of(index)
    assert data.classes.sum(1).tolist() == [len(set(image.categories.tolist())) for image in index.images]
    train(root, tmp_path / "text", "--steps", "60", "--lr", "1e-2", "--log_freq", "1", "--held_out_every", "5")
    said = capsys.readouterr().out
    losses = [float(line.split()[3]) for line in said.splitlines() if line.startswith("step ")]
    assert len(losses) == 60 and sum(losses[-20:]) < sum(losses[:20])
    assert "average precision of classes on the images left out" in said
    train(root, tmp_path / "text", "--steps", "1")
    assert "is there already" in capsys.readouterr().out
