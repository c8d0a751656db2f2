"""What is no whole checkpoint is refused in one line that names the file and the entry, before a model is made."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.content import check_content
from engine.checkpoint.files import read_identity, read_weights_file
from engine.checkpoint.identity import Identity
from engine.checkpoint.load import export_weights, load_for_sampling
from engine.checkpoint.resume import check_training_state, checkpoint_content, find_source
from engine.train.optim import build_optimizer
from engine.train.state import Position, TrainState
from models.structmar import StructMAR
from models.weights import select_trainable
from tests.helpers.tiny import CATEGORIES, CONFIG
from util.checkpoint import load_plain, safetensors_metadata, save_atomic, save_safetensors_atomic
from util.ema import Ema

WEIGHT, ALSO = "z_proj.weight", "encoder_blocks.0.attn.qkv.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "checkpoint-last.pth"
    torch.manual_seed(0)
    model = StructMAR(CONFIG)
    trainable = select_trainable(model, "full")
    optimizer = build_optimizer(trainable, 1e-3, 0.0)
    for parameter in trainable.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = TrainState(model, model, trainable, optimizer, Ema(trainable, 0.5))
    identity = Identity(CONFIG, "a" * 64, 0.5, "b" * 64, CATEGORIES)
    save_atomic(checkpoint_content(state, Position(1, 1, 8), "full", identity, {}, 4), path)
    return path


@pytest.fixture
def state(whole: Path) -> dict[str, Any]:
    return load_plain(whole)


def use(path: Path) -> None:
    """All that a checkpoint is read for."""
    read_identity(path)
    check_training_state(find_source(path.parent / "new", str(path), True, "full"))
    load_for_sampling(path)
    export_weights(path, path.parent / "export.safetensors")


def refused(path: Path, words: str = "") -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        use(path)
    message = str(caught.value)
    assert str(path) in message and words in message and "\n" not in message and len(message) < 600, message
    return message


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


def put(*keys: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return change


def drop(*keys: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        for key in keys[:-1]:
            state = state[key]
        del state[keys[-1]]

    return change


NAN = torch.full((32, 4), math.nan)
COUNTS = ("epoch", "step", "batch_in_epoch", "images_in_epoch", "global_batch")
ENTRIES = ("model", "model_ema", "optimizer", "args", "config", "vae", "text_encoder", "categories", "stage")
NEEDED = (*ENTRIES, "epoch", "step", "batch_in_epoch", "global_batch")
TWICE = [{"id": 1, "name": "dog"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "cat"}]
NO_COUNTS = (-1, 1.5, "3", None, True, 10**5000, math.nan, torch.tensor(3), [1])
OTHER_TYPES = (None, 3, torch.zeros(2), ("a",), b"x")
DAMAGE = {
    "batches that are not the images": (put("batch_in_epoch", value=10**9), "batch_in_epoch"),
    "categories of one name": (put("categories", value=TWICE), "dog"),
    "format 2": (put("format", value=2), "format"),
    "format true": (put("format", value=True), "format"),
    "format as text": (put("format", value="1"), "format"),
    "model without a tensor": (drop("model", "fake_latent"), "fake_latent"),
    "averages without a tensor": (drop("model_ema", WEIGHT), WEIGHT),
    "no averages": (put("model_ema", value={}), "model_ema"),
    "averages of something else": (put("model_ema", "other", value=torch.ones(1)), "other"),
    "model of another shape": (put("model", WEIGHT, value=torch.ones(3, 4)), WEIGHT),
    "averages of another shape": (put("model_ema", WEIGHT, value=torch.ones(3)), WEIGHT),
    "model with a surplus": (put("model", "surplus", value=torch.ones(1)), "surplus"),
    "a text among the weights": (put("model", WEIGHT, value="x"), "model"),
    "a number among the averages": (put("model_ema", WEIGHT, value=3), WEIGHT),
    "a name that is a number": (put("model", 3, value=torch.ones(1)), "model"),
    "model with NaN": (put("model_ema", WEIGHT, value=NAN), WEIGHT),
    "whole-number weights": (put("model_ema", WEIGHT, value=NAN.new_ones(32, 4).long()), WEIGHT),
    "complex weights": (put("model_ema", WEIGHT, value=torch.ones(32, 4) + 0j), WEIGHT),
    "infinite reference": (put("reference", value={WEIGHT: NAN + math.inf}), WEIGHT),
    "reference of another shape": (put("reference", value={WEIGHT: torch.ones(1)}), WEIGHT),
    "empty optimizer": (put("optimizer", value={}), "optimizer"),
    "empty optimizer state": (put("optimizer", "state", value={}), "optimizer"),
    "no optimizer state": (drop("optimizer", "state"), "optimizer"),
    "no groups": (put("optimizer", "param_groups", value=[]), "optimizer"),
    "groups of numbers": (put("optimizer", "param_groups", 0, "params", value=[0, 1]), "optimizer"),
    "optimizer without a parameter": (drop("optimizer", "state", WEIGHT), WEIGHT),
    "optimizer without a moment": (drop("optimizer", "state", WEIGHT, "exp_avg"), WEIGHT),
    "moment of another shape": (put("optimizer", "state", WEIGHT, "exp_avg_sq", value=torch.ones(2)), WEIGHT),
    "moment with NaN": (put("optimizer", "state", WEIGHT, "exp_avg", value=NAN), WEIGHT),
    "moment as text": (put("optimizer", "state", WEIGHT, value="x"), WEIGHT),
    "config unknown": (put("config", "num_planes", value=2), "num_planes"),
    "config of another type": (put("config", "encoder_depth", value="2"), "encoder_depth"),
    "config deeper": (put("config", "encoder_depth", value=60000), "encoder_depth"),
    "config endless": (put("config", "encoder_depth", value=10**12), "encoder_depth"),
    "config wider": (put("config", "encoder_embed_dim", value=32768), "encoder"),
    "config larger pictures": (put("config", "img_size", value=65536), "sizes"),
    "config stride 0": (put("config", "vae_stride", value=0), "vae_stride"),
    "config negative": (put("config", "decoder_depth", value=-1), "decoder_depth"),
    "config nested": (put("config", "patch_size", value=[[1]]), "patch_size"),
    "vae without id": (drop("vae", "id"), "id"),
    "latent scale NaN": (put("vae", "latent_scale", value=math.nan), "latent_scale"),
    "latent scale 0": (put("vae", "latent_scale", value=0), "latent_scale"),
    "latent scale endless": (put("vae", "latent_scale", value=10**400), "malformed"),
    "a category less": (drop("categories", 0), "categories"),
    "categories of texts": (put("categories", 0, value="person"), "malformed"),
    "category without name": (drop("categories", 0, "name"), "name"),
    "deep": (put("args", value=nested(100)), "deep"),
    "sampling of another type": (put("sampling", value=[1]), "sampling"),
    "sampling unknown": (put("sampling", value={"colour": 1}), "colour"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_by_name(tmp_path: Path, state: dict[str, Any], name: str) -> None:
    change, words = DAMAGE[name]
    change(state)
    path = tmp_path / "checkpoint-0000012.pth"
    torch.save(state, path)
    refused(path, words)


def test_entries_of_other_types_are_refused_by_name(state: dict[str, Any]) -> None:
    changes = [(name, value) for name in COUNTS for value in NO_COUNTS]
    changes += [(name, value) for name in ENTRIES for value in OTHER_TYPES]
    for name, value in changes:
        with pytest.raises(ValueError, match=rf"^x\.pth: {name} must be .*got ") as caught:
            check_content(state | {name: value}, Path("x.pth"))
        assert len(str(caught.value)) < 200
    for name in NEEDED:
        with pytest.raises(ValueError, match=rf"^x\.pth is a checkpoint without \['{name}'\]"):
            check_content({key: value for key, value in state.items() if key != name}, Path("x.pth"))


def test_the_whole_one_is_fine(tmp_path: Path, whole: Path) -> None:
    shutil.copy(whole, tmp_path / "checkpoint-0000012.pth")
    use(tmp_path / "checkpoint-0000012.pth")


class Foreign:
    """Not a plain value."""


def test_foreign_classes_are_refused(tmp_path: Path, state: dict[str, Any]) -> None:
    for number, value in enumerate((Foreign(), Path("x"), os.getcwd)):
        path = tmp_path / f"{number}.pth"
        torch.save(state | {"args": {"x": value}}, path)
        refused(path)


def test_links_to_nothing_and_folders_without_a_checkpoint(tmp_path: Path) -> None:
    """A run in a folder whose checkpoint is a broken link would start over and take its place."""
    link = tmp_path / "checkpoint-last.pth"
    with pytest.raises(FileNotFoundError, match="is a folder without checkpoint-last.pth"):
        find_source(tmp_path / "new", str(tmp_path), True, "full")
    link.symlink_to(tmp_path / "gone.pth")
    with pytest.raises(FileNotFoundError, match=r"is a link to .*gone\.pth, which does not exist"):
        find_source(tmp_path, "", True, "full")
    link.unlink()
    link.mkdir()
    with pytest.raises(FileNotFoundError, match="is a folder without checkpoint-last.pth"):
        find_source(tmp_path, "", True, "full")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", "-1"), ("step", "1.5"), ("step", "9" * 5000), ("weights", "average"), ("config", "[" * 100000),
        ("config", "[1]"), ("config", '{"img_size": ' + "9" * 5000 + "}"), ("categories", "3"), ("vae", "[]"),
        ("vae", '{"id": "x", "latent_scale": 1e999}'), ("text_encoder", "null"), ("format", "structmar-9"),
    ],
)  # fmt: skip
def test_metadata_of_exports_is_checked(tmp_path: Path, whole: Path, key: str, value: str) -> None:
    path = tmp_path / "export.safetensors"
    export_weights(whole, path)
    save_safetensors_atomic(load_plain(path), path, safetensors_metadata(path) | {key: value})
    with pytest.raises(ValueError, match=r"export\.safetensors") as caught:
        load_for_sampling(path)
    assert "\n" not in str(caught.value)


def test_the_newest_whole_checkpoint_is_named(tmp_path: Path, whole: Path) -> None:
    last = tmp_path / "checkpoint-last.pth"
    for name in (last.name, "checkpoint-0000010.pth", "checkpoint-0000020.pth", "checkpoint-0000030.pth"):
        shutil.copy(whole, tmp_path / name)
    for damaged in (last, tmp_path / "checkpoint-0000030.pth"):
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 4
        damaged.write_bytes(content)
    newest = f"the newest whole checkpoint there is {tmp_path / 'checkpoint-0000020.pth'}"
    with pytest.raises(ValueError, match="checkpoint-last.pth is damaged: .*" + newest):
        read_weights_file(tmp_path)
    shutil.copy(tmp_path / "checkpoint-0000020.pth", last)
    assert read_weights_file(tmp_path)["step"] == 1
