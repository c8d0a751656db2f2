"""Exported weights: the same images, everything that sampling needs in the file, and clear words where it is not."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import scripts.export_weights
import scripts.sample
from engine.checkpoint.files import read_weights_file
from engine.checkpoint.identity import METADATA_KEYS, Identity
from engine.checkpoint.load import export_weights, load_for_sampling, read_weights
from models.sampling.config import SamplingConfig
from tests.conftest import ROOT
from tests.helpers.tiny import CATEGORIES, CONFIG, World, write_world
from util.checkpoint import load_plain, safetensors_metadata, save_atomic, save_safetensors_atomic

SAMPLING = SamplingConfig(num_iter=16, cfg_text=6.0, cfg_layout=4.0, clip_x0=5.0, guidance_interval=(0.1, 0.9))
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
    assert load_for_sampling(tmp_path / "raw.safetensors", use_ema=False).identity.weights == "raw"


def test_everything_needed_is_in_the_file(world, exported):
    identity = load_for_sampling(exported).identity
    assert identity == load_for_sampling(world.checkpoint).identity
    assert (identity.config, identity.categories, identity.stage, identity.step) == (CONFIG, CATEGORIES, "full", 7)
    assert identity.latent_scale == 0.5 and len(identity.vae_id) == len(identity.text_encoder_id) == 64
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
    assert load_for_sampling(path).identity.step == 7


def test_sampling_options_are_carried_over_or_replaced(world, exported, tmp_path):
    """From a YAML file, on the way from a checkpoint or from an exported file."""
    (tmp_path / "sampling.yaml").write_text("num_iter: 16\ncfg: 4\ncfg_text: 6.0\nclip_x0: 5.0\n")
    flags = ["--sampling_config", str(tmp_path / "sampling.yaml")]
    first, second, third = (tmp_path / f"{name}.safetensors" for name in ("first", "second", "third"))
    scripts.export_weights.main(["--resume", str(world.checkpoint), "--output", str(first), *flags])
    scripts.export_weights.main(["--resume", str(first), "--output", str(second)])
    expected = SamplingConfig(num_iter=16, cfg_text=6.0, cfg_layout=4.0, clip_x0=5.0)
    assert [load_for_sampling(path).identity.sampling for path in (exported, first, second)] == [
        None,
        expected,
        expected,
    ]
    (tmp_path / "sampling.yaml").write_text("num_iter: 8\n")
    scripts.export_weights.main(["--resume", str(second), "--output", str(third), *flags])
    assert load_for_sampling(third).identity.sampling == SamplingConfig(num_iter=8)
    before, after = load_plain(exported), load_plain(third)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_iters: 8", r"sampling\.yaml: unknown key num_iters \(value 8\), did you mean num_iter"),
        ("batch_size: 8", r"sampling\.yaml: unknown key batch_size"),
        ("num_iter: 0", r"sampling\.yaml: --num_iter must be positive, got 0"),
        ("cfg: high", r"sampling\.yaml: cfg: 'high': could not convert string to float"),
    ],
)
def test_bad_sampling_files(world, tmp_path, text, message):
    (tmp_path / "sampling.yaml").write_text(text)
    output = tmp_path / "weights.safetensors"
    flags = ["--sampling_config", str(tmp_path / "sampling.yaml"), "--output", str(output)]
    with pytest.raises(SystemExit, match=message):
        scripts.export_weights.main(["--resume", str(world.checkpoint), *flags])
    assert not output.exists()


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
        ("config", "{}", "malformed metadata: 3 categories, but the model has 0"),
        (
            "config",
            '{"num_categories": 3, "depth": 2}',
            r"malformed metadata: model config: unknown fields \['depth'\]",
        ),
        ("config", '{"num_categories": "3"}', "malformed metadata: model config: num_categories must be int, got '3'"),
        ("sampling", "16", "malformed metadata: sampling options: expected names and values, got 16"),
        ("sampling", '{"num_iter": 1.5}', "malformed metadata: sampling options: num_iter must be int, got 1.5"),
        ("sampling", '{"num_iter": 0}', "malformed metadata: sampling options: num_iter must be at least 1, got 0"),
        ("categories", json.dumps([{"id": 1, "name": "person"}]), "1 categories, but the model has 3"),
        ("categories", "7", "malformed metadata: categories must be a list, got 7"),
        ("categories", '[{"id": 1, "name": null}]', r"malformed metadata: categories\[0\]: name must be str, got None"),
        ("categories", json.dumps([{"id": 1, "name": "dog"}] * 3), "malformed metadata: categories: two .* id 1"),
        ("vae", "{}", "malformed metadata: vae lacks 'id'"),
        ("vae", "[]", r"malformed metadata: vae must be names and values, got \[\]"),
        ("step", "many", "malformed metadata: the file: step must be int, got 'many'"),
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
    _, identity = read_weights(world.checkpoint)
    assert identity.sampling is None
    sampled = replace(identity, sampling=SAMPLING, reward_detector_id="d" * 64)
    for each in (identity, sampled):
        assert Identity.from_metadata(each.to_metadata(), "here") == each
        assert Identity.from_dict(each.to_dict(), "here", "ema") == each
