"""Files that were written before configs and checkpoints could grow: they load, sample, continue and export.

tests/data/format_1/checkpoint.pth: three steps of a stage-2 run (`RUN`); export.safetensors: its averaged weights.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import main_mar
import scripts.sample
from engine.checkpoint.files import identity_of, read_weights_file
from engine.checkpoint.load import export_weights, load_for_sampling, read_weights
from models.config import PRESETS, _sizes
from tests.conftest import ROOT
from tests.helpers.tiny_run import argv, load_checkpoint, write_world
from util.checkpoint import load_plain, safetensors_metadata, save_atomic

DATA = ROOT / "tests" / "data" / "format_1"
COMMITTED = ROOT / "pretrained_models" / "mini" / "structmar_mini_stage2.safetensors"
SIZES = _sizes(8, 1, 1, 1, 8) | {"img_size": 32, "vae_stride": 8, "buffer_size": 8, "max_objects": 4, "class_num": 4}
RUN = {"model": "mar_tiny", "resume": None, "train_mode": "full", "log_freq": 1, "attn_dropout": 0.1}
RUN |= {"diffloss_d": None, "diffloss_w": None}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def _tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "mar_tiny", SIZES)


@pytest.fixture(scope="module")
def checkpoint(world: Path) -> Path:
    """The committed file with the ids of this world's frozen parts, whose bytes depend on torch's version."""
    state = load_plain(DATA / "checkpoint.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "mar_tiny", SIZES)
        main_mar.main(argv(world, "here", max_steps=1, **RUN))
    here = load_checkpoint(world, "here")
    path = world / "then.pth"
    save_atomic(state | {name: here[name] for name in ("vae", "text_encoder")}, path)
    return path


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_what_the_files_say() -> None:
    state = read_weights_file(DATA / "checkpoint.pth")
    assert state["format"] == 1 and "sampling" not in state
    identity = identity_of(state, DATA / "checkpoint.pth")
    assert identity is not None and identity.sampling is None
    assert (identity.stage, identity.step, identity.weights) == ("full", 3, "ema")
    exported = load_for_sampling(DATA / "export.safetensors").identity
    assert exported == identity
    metadata, again = safetensors_metadata(DATA / "export.safetensors"), exported.to_metadata()
    config = json.loads(metadata.pop("config"))
    assert config.items() <= json.loads(again["config"]).items()  # written again, it says the same
    assert metadata.items() <= again.items()


def test_the_committed_weights_load() -> None:
    loaded = load_for_sampling(COMMITTED)
    assert loaded.identity.stage == "full" and len(loaded.identity.categories) == loaded.model.config.num_categories


def test_a_run_of_then_goes_on_now(world: Path, checkpoint: Path) -> None:
    """Three steps then and two now are five steps now."""
    assert main_mar.main([*argv(world, "whole", max_steps=5, **RUN), "--no-ema_warmup"]) == 0  # there was none then
    (world / "then").mkdir()
    shutil.copy(checkpoint, world / "then" / "checkpoint-last.pth")
    assert main_mar.main(argv(world, "then", max_steps=5, **RUN)) == 0
    whole, parts = load_checkpoint(world, "whole"), load_checkpoint(world, "then")
    assert (parts["step"], parts["epoch"], parts["batch_in_epoch"]) == (5, whole["epoch"], whole["batch_in_epoch"])
    for name in ("model", "model_ema"):
        assert_close(parts[name], whole[name])
    assert parts["format"] == 1 and read_weights_file(world / "then")["step"] == 5


def test_weights_of_then_are_a_start_now(world: Path, checkpoint: Path) -> None:
    flags = RUN | {"resume": checkpoint, "train_mode": "backbone", "lr": 1e-30}
    assert main_mar.main(argv(world, "next", max_steps=1, **flags)) == 0
    found, before = load_checkpoint(world, "next")["model"], read_weights(checkpoint)[0]
    torch.testing.assert_close(found["z_proj.weight"], before["z_proj.weight"], rtol=0, atol=1e-20)


def test_it_samples_and_exports(world: Path, checkpoint: Path, tmp_path: Path) -> None:
    identity = export_weights(checkpoint, tmp_path / "export.safetensors", "fp16")
    then, now = load_plain(DATA / "export.safetensors"), load_plain(tmp_path / "export.safetensors")
    assert then.keys() == now.keys() and all(torch.equal(then[name], now[name]) for name in then)
    assert (identity.step, identity.weights) == (3, "ema")
    flags = ["--prompt", "a red dog", "--num_images", "1", "--num_iter", "4", "--num_sampling_steps", "4"]
    flags += ["--vae_path", str(world / "vae.ckpt"), "--clip_path", str(world / "clip"), "--device", "cpu"]
    scripts.sample.main(["--resume", str(checkpoint), "--output_dir", str(tmp_path / "out"), *flags])
    assert json.loads((tmp_path / "out" / "samples.json").read_text())["checkpoint"]["step"] == 3


def test_a_newer_files_field_is_named(checkpoint: Path, tmp_path: Path) -> None:
    state = load_plain(checkpoint)
    state["config"] |= {"num_planes": 2}
    save_atomic(state, tmp_path / "newer.pth")
    with pytest.raises(ValueError, match=r"newer\.pth has malformed metadata: model config: unknown fields"):
        load_for_sampling(tmp_path / "newer.pth")
