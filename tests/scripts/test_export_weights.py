"""Exported weights: the same images, everything that sampling needs in the file, and clear words where it is not."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import scripts.export_weights
import scripts.sample
from engine.checkpoint.identity import METADATA_KEYS, WeightsInfo
from engine.checkpoint.load import export_weights, load_for_sampling, read_weights
from engine.checkpoint.resume import read_weights_file
from tests.conftest import ROOT
from tests.helpers.tiny import CATEGORIES, CONFIG, World, write_world
from util.checkpoint import load_plain, safetensors_metadata, save_atomic, save_safetensors_atomic

FAST = ["--num_iter", "4", "--num_sampling_steps", "4", "--clip_x0", "3", "--device", "cpu", "--num_images", "2"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def exported(world, tmp_path):
    path = tmp_path / "weights.safetensors"
    export_weights(world.checkpoint, path)
    return path


def sampled(world, resume, folder) -> list[np.ndarray]:
    flags = [*world.frozen_flags(), *FAST, "--layout", str(world.layout), "--cfg", "2"]
    scripts.sample.main(["--resume", str(resume), *flags, "--output_dir", str(folder)])
    return [np.asarray(Image.open(folder / f"{index:04d}.png")).astype(int) for index in range(4)]


def test_exported_weights_give_identical_images(world, exported, tmp_path):
    before, after = sampled(world, world.checkpoint, tmp_path / "before"), sampled(world, exported, tmp_path / "after")
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))


def test_the_average_is_exported_unless_refused(world, tmp_path):
    checkpoint = load_plain(world.checkpoint)
    export_weights(world.checkpoint, tmp_path / "ema.safetensors")
    export_weights(world.checkpoint, tmp_path / "raw.safetensors", use_ema=False)
    averaged, raw = load_plain(tmp_path / "ema.safetensors"), load_plain(tmp_path / "raw.safetensors")
    assert averaged.keys() == raw.keys() == checkpoint["model"].keys()
    for name, tensor in checkpoint["model"].items():
        assert torch.equal(raw[name], tensor)
        assert torch.equal(averaged[name], checkpoint["model_ema"].get(name, tensor))
    assert not torch.equal(averaged["fake_latent"], raw["fake_latent"])
    with pytest.raises(ValueError, match=r"ema\.safetensors holds the ema weights only"):
        load_for_sampling(tmp_path / "ema.safetensors", use_ema=False)
    assert load_for_sampling(tmp_path / "raw.safetensors", use_ema=False).info.weights == "raw"


def test_everything_needed_is_in_the_file(world, exported):
    info = load_for_sampling(exported).info
    assert info == load_for_sampling(world.checkpoint).info
    assert (info.config, info.categories, info.stage, info.step) == (CONFIG, CATEGORIES, "full", 7)
    assert info.latent_scale == 0.5 and len(info.vae_id) == len(info.text_encoder_id) == 64
    metadata = safetensors_metadata(exported)
    assert set(metadata) == set(METADATA_KEYS) and metadata["format"] == "structmar-1"


def test_training_can_start_from_it(exported):
    state = read_weights_file(exported)
    assert state["stage"] == "full" and "optimizer" not in state
    assert state["config"] == CONFIG.to_dict()


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp16", 2e-3), ("bf16", 2e-2)])
def test_half_precision_halves_the_file(world, exported, tmp_path, dtype, tolerance):
    path = tmp_path / "half.safetensors"
    export_weights(world.checkpoint, path, dtype)
    assert path.stat().st_size < 0.7 * exported.stat().st_size  # the header is not small here
    model = load_for_sampling(path).model
    full = load_for_sampling(exported).model.state_dict()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, full[name], rtol=tolerance, atol=tolerance)


def test_values_that_half_precision_cannot_hold(world, tmp_path):
    checkpoint = load_plain(world.checkpoint)
    checkpoint["model_ema"]["fake_latent"] = torch.full_like(checkpoint["model"]["fake_latent"], 1e6)
    save_atomic(checkpoint, tmp_path / "loud.pth")
    with pytest.raises(ValueError, match=r"loud\.pth: fake_latent is not finite in fp16"):
        export_weights(tmp_path / "loud.pth", tmp_path / "half.safetensors", "fp16")
    assert not (tmp_path / "half.safetensors").exists()


def test_script(world, tmp_path):
    path = tmp_path / "sub" / "weights.safetensors"
    command = [sys.executable, "-m", "scripts.export_weights", "--resume", str(world.checkpoint), "--output", str(path)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert "ema weights of stage full after 7 steps" in finished.stdout
    assert load_for_sampling(path).info.step == 7


@pytest.mark.parametrize("missing", METADATA_KEYS)
def test_incomplete_metadata_is_named(exported, tmp_path, missing):
    metadata = safetensors_metadata(exported)
    del metadata[missing]
    path = tmp_path / "poor.safetensors"
    save_safetensors_atomic(load_plain(exported), path, metadata)
    with pytest.raises(ValueError, match=rf"poor\.safetensors lacks the metadata \['{missing}'\].*export_weights"):
        load_for_sampling(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", "structmar-9", "has format 'structmar-9', this version reads 'structmar-1'"),
        ("config", "{", "malformed metadata"),
        ("config", "{}", r"malformed metadata.*missing fields \['attn_dropout'"),
        ("categories", json.dumps([{"id": 1, "name": "person"}]), "1 categories, but the model has 3"),
        ("vae", "{}", "malformed metadata: KeyError: 'id'"),
        ("step", "many", "malformed metadata.*many"),
    ],
)
def test_malformed_metadata(exported, tmp_path, key, value, message):
    path = tmp_path / "odd.safetensors"
    save_safetensors_atomic(load_plain(exported), path, safetensors_metadata(exported) | {key: value})
    with pytest.raises(ValueError, match=rf"odd\.safetensors.*{message}"):
        load_for_sampling(path)


def test_tensors_that_do_not_fit_their_config(exported, tmp_path):
    tensors = load_plain(exported)
    tensors["fake_latent"] = torch.zeros(1, 48)
    save_safetensors_atomic(tensors, tmp_path / "odd.safetensors", safetensors_metadata(exported))
    with pytest.raises(ValueError, match=r"odd\.safetensors.*fake_latent: \(1, 48\) in the file, \(1, 32\)"):
        load_for_sampling(tmp_path / "odd.safetensors")


def test_files_that_are_no_checkpoint(world, tmp_path):
    save_atomic({"something": 1}, tmp_path / "else.pth")
    with pytest.raises(ValueError, match=r"else\.pth"):
        load_for_sampling(tmp_path / "else.pth")
    with pytest.raises(FileNotFoundError, match=r"none\.pth does not exist"):
        load_for_sampling(tmp_path / "none.pth")
    with pytest.raises(ValueError, match=r"mar\.safetensors holds MAR's weights"):
        read_weights(world.mar)
    with pytest.raises(ValueError, match=r"must end in \.safetensors, got .*weights\.pth"):
        export_weights(world.checkpoint, tmp_path / "weights.pth")


def test_metadata_round_trip(world):
    _, info = read_weights(world.checkpoint)
    assert WeightsInfo.from_metadata(info.to_metadata(), "here") == info
