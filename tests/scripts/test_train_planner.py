"""scripts/train_planner.py: what a run leaves, that it goes on where it stopped, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import scripts.train_planner
from engine.plan.files import load_planner
from tests.helpers.coco_fixture import DEFAULT_IMAGES, write_coco
from tests.helpers.tiny import World, write_world
from util.checkpoint import load_plain

IMAGES = [
    type(image)(image.id + 100 * copy, image.width, image.height, image.boxes, image.captions)
    for copy in range(3)
    for image in DEFAULT_IMAGES
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def flags(world: World) -> list[str]:
    root = write_coco(world.root / "coco", images=IMAGES)
    (root / "train2017").rename(root / "moved")  # no pixel is read
    sizes = ["--width", "16", "--depth", "1", "--num_heads", "2", "--num_bins", "9", "--max_objects", "3"]
    data = ["--coco_root", str(root), "--img_size", "32", "--clip_path", str(world.clip), "--stop_share", "0.3"]
    often = ["--log_freq", "2", "--eval_freq", "3", "--save_freq_steps", "2", "--device", "cpu"]
    return [*sizes, *data, *often, "--batch_size", "4", "--epochs", "3"]


def train(flags: list[str], folder: Path, *more: str) -> Path:
    assert scripts.train_planner.main([*flags, "--output_dir", str(folder), *more]) == 0
    return folder


@pytest.fixture(scope="module")
def whole(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(flags, tmp_path_factory.mktemp("run") / "whole")


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_repeats_and_explains_it(whole: Path) -> None:
    names = {path.name for path in whole.iterdir()}
    assert {"args.yaml", "environment.json", "log.txt", "metrics.jsonl", "tensorboard", "planner.safetensors"} <= names
    assert {"loss", "grad_norm", "lr"} <= lines(whole)[-2].keys() | lines(whole)[-1].keys()
    assert "eval/loss" in lines(whole)[-1]  # the last weights are evaluated
    board = EventAccumulator(str(whole / "tensorboard"))
    board.Reload()
    assert {"train/loss", "eval/loss", "eval/class_F1"} <= set(board.Tags()["scalars"])


def test_the_kept_weights_are_the_averages_of_the_best_evaluation(whole: Path) -> None:
    evaluated = [line for line in lines(whole) if "eval/loss" in line]
    best = min(evaluated, key=lambda line: line["eval/loss"])
    last = load_plain(whole / "checkpoint-last.pth")
    assert last["best"]["step"] == best["step"] and last["best"]["loss"] == best["eval/loss"]
    planner, _ = load_planner(whole)
    if best["step"] == last["position"]["step"]:
        for name, tensor in planner.state_dict().items():
            assert torch.equal(tensor, last["model_ema"][name].half().float()), name


@pytest.mark.parametrize("at", [1, 3])
def test_a_run_that_stopped_goes_on_as_if_it_had_not(at: int, whole: Path, flags: list[str], tmp_path: Path) -> None:
    """Bit for bit: weights, averages, metrics, and the file that is kept. Also inside an interval."""
    train(flags, tmp_path, "--max_steps", str(at))
    train(flags, tmp_path)
    found, wanted = (load_plain(folder / "checkpoint-last.pth") for folder in (tmp_path, whole))
    for part in ("model", "model_ema"):
        assert all(torch.equal(found[part][name], tensor) for name, tensor in wanted[part].items())
    assert found["position"] == wanted["position"] and found["best"] == wanted["best"]
    assert (tmp_path / "planner.safetensors").read_bytes() == (whole / "planner.safetensors").read_bytes()
    later = [
        [each | {"images_per_second": 0} for each in lines(folder) if each["step"] > 4] for folder in (tmp_path, whole)
    ]
    assert later[0] == later[1] != []


def test_a_run_that_does_not_improve_ends_by_its_patience(flags: list[str], tmp_path: Path) -> None:
    train(flags, tmp_path, "--lr", "1e-12", "--eval_freq", "1", "--patience", "1", "--ema_rate", "0")
    assert load_plain(tmp_path / "checkpoint-last.pth")["position"]["step"] < 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--width", "15"], "--width 15 is no multiple of --num_heads 2"),
        (["--coco_split", "val2014"], "COCO annotations not found"),
        (["--held_out_every", "1"], "none of the 12 images"),
        (["--cached_path", "nowhere"], "--cached_path nowhere has no text/"),
        (["--batch_size", "64"], "fewer than one global batch"),
    ],
)
def test_mistakes_are_one_line_and_touch_no_folder(
    more: list[str], message: str, flags: list[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as error:
        scripts.train_planner.main([*flags, "--output_dir", str(tmp_path / "out"), *more])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out" / "checkpoint-last.pth").exists()


def test_another_planners_folder_is_not_continued(whole: Path, flags: list[str]) -> None:
    with pytest.raises(SystemExit, match="was made with depth 1, this run has 2"):
        scripts.train_planner.main([*flags, "--output_dir", str(whole), "--depth", "2"])
