"""scripts/sample.py, from the command line to the files: what is written, what is refused before anything runs."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import engine.cli.build_sample
import scripts.sample
from engine.data.scenes import KnownLabels, read_layout_file
from models.frozen.vae import build_autoencoder, ldm_checkpoint
from models.structmar import StructMARConfig
from tests.conftest import ROOT
from tests.helpers.scene_files import write_coco
from tests.helpers.tiny import CATEGORIES, MAR_CONFIG, VAE, World, write_checkpoint, write_world
from util.checkpoint import save_atomic
from util.images import read_png_text

FAST = ["--num_iter", "4", "--num_sampling_steps", "4", "--clip_x0", "3", "--device", "cpu"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def sample(world, tmp_path):
    """Runs the script in this process; returns the output folder."""

    def run(*flags: str, resume: Path | None = None, output: str = "out") -> Path:
        resume_flags = ["--resume", str(resume or world.checkpoint)]
        scripts.sample.main(
            [*resume_flags, *world.frozen_flags(), *FAST, "--output_dir", str(tmp_path / output), *flags]
        )
        return tmp_path / output

    return run


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def read_json(folder: Path) -> dict:
    return json.loads((folder / "samples.json").read_text())


def test_end_to_end_in_a_process_of_its_own(world, tmp_path):
    """As a user types it, from the repository's root."""
    out = tmp_path / "deep" / "out"
    flags = ["--resume", str(world.checkpoint.parent), *world.frozen_flags(), *FAST, "--layout", str(world.layout)]
    command = [sys.executable, "-m", "scripts.sample", *flags, "--num_images", "2", "--output_dir", str(out)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert f"grid: {out / 'grid.png'}" in finished.stdout
    assert "sampling: 100%" in finished.stderr
    names = sorted(path.name for path in out.iterdir())
    assert names == ["0000.png", "0001.png", "0002.png", "0003.png", "grid.png", "samples.json"]
    assert pixels(out / "0000.png").shape == (32, 32, 3)


def test_mistakes_end_with_one_line(world, tmp_path):
    flags = ["--resume", str(world.checkpoint), *world.frozen_flags(), "--layout", str(tmp_path / "none.json")]
    command = [sys.executable, "-m", "scripts.sample", *flags, "--output_dir", str(tmp_path / "out")]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 1
    assert finished.stderr.splitlines()[-1] == f"error: layout file {tmp_path / 'none.json'} does not exist"
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "out").exists()


def test_png_text_and_json_tell_how_to_make_the_image_again(sample, world, tmp_path):
    out = sample("--layout", str(world.layout), "--num_images", "2", "--seed", "40", "--cfg", "2")
    content = read_json(out)
    assert [image["seed"] for image in content["images"]] == [40, 41, 42, 43]
    assert [image["prompt"] for image in content["images"]] == ["a dog and a ball"] * 2 + ["a red dog"] * 2
    assert content["sampling"]["num_iter"] == 4 and content["settings"]["cfg"] == 2.0
    assert content["checkpoint"]["stage"] == "full" and content["checkpoint"]["weights"] == "ema"

    text = read_png_text(out / "0001.png")
    assert text["prompt"] == "a dog and a ball" and text["seed"] == "41"
    assert json.loads(text["sampling"]) == content["sampling"]
    assert json.loads(text["checkpoint"]) == content["checkpoint"]
    entry = {"prompt": text["prompt"], "objects": json.loads(text["objects"])}
    again = tmp_path / "again.json"
    again.write_text(json.dumps(entry))
    assert read_layout_file(again, KnownLabels(CATEGORIES, 4))[0].names == ["dog", "sports ball"]
    alone = sample("--layout", str(again), "--num_images", "1", "--seed", "41", "--cfg", "2", output="again")
    assert np.abs(pixels(alone / "0000.png") - pixels(out / "0001.png")).max() <= 1


def test_batch_size_does_not_change_images(sample, world):
    many = sample("--layout", str(world.layout), "--num_images", "2", "--batch_size", "4", output="many")
    single = sample("--layout", str(world.layout), "--num_images", "2", "--batch_size", "1", output="single")
    for index in range(4):
        name = f"{index:04d}.png"
        assert np.abs(pixels(many / name) - pixels(single / name)).max() <= 1


def test_guidance_flags(sample, world):
    def scales(*flags: str) -> tuple[float, float]:
        out = sample("--layout", str(world.layout), "--num_images", "1", *flags)
        sampling = read_json(out)["sampling"]
        return sampling["cfg_text"], sampling["cfg_layout"]

    assert scales() == (1, 1)
    assert scales("--cfg", "3") == (3, 3)
    assert scales("--cfg", "3", "--cfg_layout", "5") == (3, 5)
    assert scales("--cfg_text", "2", "--cfg_layout", "4") == (2, 4)


def test_prompt_alone_and_over_a_file(sample, world):
    out = sample("--prompt", "a red dog", "--num_images", "1")
    assert read_json(out)["images"][0]["objects"] == []
    out = sample("--prompt", "mine", "--layout", str(world.layout), "--num_images", "1")
    assert [image["prompt"] for image in read_json(out)["images"]] == ["mine", "mine"]


def test_files_of_other_projects(sample, tmp_path):
    """They are drawn like ours, and name the flag where their keys say two things."""
    entry = {"prompt": "dogs", "object_list": [["dog", [0.25, 0.25, 0.5, 0.5]]]}
    (tmp_path / "answer.json").write_text(json.dumps(entry))
    flags = ["--layout", str(tmp_path / "answer.json"), "--num_images", "1"]
    with pytest.raises(SystemExit, match="Say which by --layout_format layoutgpt or nsr1k"):
        sample(*flags)
    for form, corner in (("layoutgpt", 0.5), ("nsr1k", 0.75)):
        (image,) = read_json(sample(*flags, "--layout_format", form))["images"]
        assert image["objects"] == [{"label": "dog", "bbox": [0.25, 0.25, corner, corner]}]


def test_scenes_of_a_dataset(sample, tmp_path):
    """Without a single image file: the annotations are enough."""
    write_coco(tmp_path / "coco")
    out = sample("--coco_root", str(tmp_path / "coco"), "--coco_split", "val2017", "--num_images", "2")
    assert [image["prompt"] for image in read_json(out)["images"]] == ["caption 0 of 1", "caption 0 of 3"]
    assert [len(image["objects"]) for image in read_json(out)["images"]] == [1, 2]


def test_config_file_is_read(sample, tmp_path):
    (tmp_path / "sample.yaml").write_text("prompt: a red dog\nnum_images: 2\ncfg: 4.0\n")
    out = sample("--config", str(tmp_path / "sample.yaml"), "--num_images", "1")
    content = read_json(out)
    assert len(content["images"]) == 1 and content["sampling"]["cfg_text"] == 4


def test_another_source_than_the_config_files(sample, world, tmp_path):
    write_coco(tmp_path / "coco")
    (tmp_path / "sample.yaml").write_text(f"layout: {world.layout}\nnum_images: 1\n")
    flags = ("--config", str(tmp_path / "sample.yaml"), "--coco_root", str(tmp_path / "coco"))
    with pytest.raises(SystemExit, match="got --layout/--prompt/--speech, --coco_root"):
        sample(*flags, "--coco_split", "val2017")
    out = sample(*flags, "--coco_split", "val2017", "--layout", "")
    assert read_json(out)["images"][0]["prompt"] == "caption 0 of 1"


def test_ema_is_the_default(sample):
    flags = ("--prompt", "a red dog", "--num_images", "1")
    averaged, raw = sample(*flags, output="ema"), sample(*flags, "--no_ema", output="raw")
    assert read_json(raw)["checkpoint"]["weights"] == "raw"
    assert np.abs(pixels(averaged / "0000.png") - pixels(raw / "0000.png")).max() > 3


@pytest.fixture
def tiny_preset(monkeypatch):
    """No preset is as small as the tests' weights."""

    def backbone_config(name: str, **overrides: Any) -> StructMARConfig:
        assert name == "mar_tiny"
        return replace(MAR_CONFIG, **overrides)

    monkeypatch.setattr(engine.cli.build_sample, "backbone_config", backbone_config)
    monkeypatch.setattr(scripts.sample, "backbone_config", backbone_config)
    return ("--model", "mar_tiny")


def test_mar_weights_are_sampled_by_class(sample, world, tiny_preset):
    out = sample("--class_label", "1", "3", "--num_images", "2", *tiny_preset, resume=world.mar)
    images = read_json(out)["images"]
    assert [image["class_label"] for image in images] == [1, 1, 3, 3]
    assert read_png_text(out / "0002.png")["class_label"] == "3"


def test_class_mistakes(sample, world, tiny_preset):
    with pytest.raises(SystemExit, match=r"--class_label 5 is outside 0 \.\.\. 4"):
        sample("--class_label", "5", *tiny_preset, resume=world.mar)
    with pytest.raises(SystemExit, match=r"mar\.safetensors has 5 classes, the model 7: pass --class_num 5"):
        sample("--class_label", "5", *tiny_preset, "--class_num", "7", resume=world.mar)


def test_class_conditional_checkpoints_know_their_sizes(sample, world, tmp_path):
    write_checkpoint(world, tmp_path / "class.pth", MAR_CONFIG, "class")
    out = sample("--class_label", "4", "--num_images", "1", resume=tmp_path / "class.pth")  # mar_huge is not asked for
    assert pixels(out / "0000.png").shape == (32, 32, 3)
    with pytest.raises(SystemExit, match=r"class\.pth holds MAR's weights.*--class_label"):
        sample("--prompt", "a", resume=tmp_path / "class.pth")


def test_only_its_own_files_are_replaced(sample, tmp_path):
    out = sample("--prompt", "a red dog", "--num_images", "3")
    (out / "notes.txt").write_text("mine")
    sample("--prompt", "a red dog", "--num_images", "1")
    assert sorted(path.name for path in out.iterdir()) == ["0000.png", "grid.png", "notes.txt", "samples.json"]

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "0007.png").write_bytes(b"another program's")
    sample("--prompt", "a red dog", "--num_images", "1", output="foreign")
    assert (foreign / "0007.png").read_bytes() == b"another program's"


MISTAKES = {
    "nothing to generate": ([], "exactly one of --layout/--prompt/--speech, --coco_root, --class_label; got none"),
    "two sources": (["--prompt", "a", "--coco_root", "x"], "got --layout/--prompt/--speech, --coco_root"),
    "no images": (["--prompt", "a", "--num_images", "0"], "--num_images must be positive, got 0"),
    "batch": (["--prompt", "a", "--batch_size", "-1"], "--batch_size must be positive, got -1"),
    "columns": (["--prompt", "a", "--grid_columns", "0"], "--grid_columns must be positive, got 0"),
    "seed": (["--prompt", "a", "--seed", "-1"], r"--seed must lie in 0 \.\.\. \d+, got -1"),
    "guidance": (["--prompt", "a", "--cfg", "nan"], "--cfg must lie in \\[0, 100\\], got nan"),
    "temperature": (["--prompt", "a", "--temperature", "-1"], "--temperature must not be negative, got -1"),
    "iterations": (
        ["--prompt", "a", "--num_iter", "65"],
        "num_iter must lie between 1 and the number of tokens, 64, got 65",
    ),
    "steps": (["--prompt", "a", "--num_sampling_steps", "0"], "--num_sampling_steps must be positive, got 0"),
    "device": (["--prompt", "a", "--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
    "checkpoint": (["--prompt", "a", "--resume", "none.pth"], "none.pth does not exist"),
    "vae": (["--prompt", "a", "--vae_path", "none.ckpt"], "none.ckpt"),
    "text encoder": (["--prompt", "a", "--clip_path", "none"], "text encoder directory not found: none"),
    "classes of a StructMAR": (["--class_label", "1"], "does not hold MAR's weights but a StructMAR's"),
    "dataset": (["--coco_root", "none"], "none"),
    "format of no file": (["--prompt", "a", "--layout_format", "gligen"], "--layout_format gligen needs --layout"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_found_before_anything_runs(sample, tmp_path, case):
    flags, message = MISTAKES[case]
    with pytest.raises(SystemExit, match=message):
        sample(*flags)
    assert not (tmp_path / "out").exists()


def test_output_dir_that_is_a_file(sample, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(SystemExit, match="out is a file, it must be a folder"):
        sample("--prompt", "a")


def test_mar_weights_need_a_class(sample, world):
    with pytest.raises(SystemExit, match=r"mar\.safetensors holds MAR's weights.*--class_label"):
        sample("--prompt", "a", resume=world.mar)


def test_too_many_objects_name_the_limit(sample, tmp_path):
    box = {"label": "dog", "bbox": [0, 0, 1, 1]}
    (tmp_path / "many.json").write_text(json.dumps({"prompt": "dogs", "objects": [box] * 5}))
    with pytest.raises(SystemExit, match="5 objects, but the checkpoint places at most 4"):
        sample("--layout", str(tmp_path / "many.json"))


def test_other_categories_are_refused(sample, tmp_path):
    write_coco(tmp_path / "coco")
    path = tmp_path / "coco" / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text().replace('"dog"', '"cat"'))
    with pytest.raises(SystemExit, match="18 cat.*but the checkpoint was trained with.*18 dog"):
        sample("--coco_root", str(tmp_path / "coco"), "--coco_split", "val2017")


def test_another_vae_is_refused_or_allowed(sample, tmp_path, capfd):
    other = tmp_path / "other.ckpt"
    torch.manual_seed(1)
    save_atomic(ldm_checkpoint(build_autoencoder(VAE), 0.5, torch.float32), other)
    flags = ("--prompt", "a red dog", "--num_images", "1", "--vae_path", str(other))
    with pytest.raises(SystemExit, match=r"VAE .*other\.ckpt has id \w{64}, but .* \w{64}; --allow_other_frozen"):
        sample(*flags)
    out = sample(*flags, "--allow_other_frozen")
    assert (out / "0000.png").is_file()
    assert "used anyway (--allow_other_frozen)" in capfd.readouterr().err


def test_another_text_encoder_is_refused(sample, world, tmp_path):
    clip = shutil.copytree(world.clip, tmp_path / "clip")
    settings = json.loads((clip / "config.json").read_text())
    (clip / "config.json").write_text(json.dumps(settings | {"layer_norm_eps": 1e-4}))
    with pytest.raises(SystemExit, match=r"text encoder .* has id \w{64}, but the checkpoint was trained with \w{64}"):
        sample("--prompt", "a", "--clip_path", str(clip))
