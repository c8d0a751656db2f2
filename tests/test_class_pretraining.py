"""main_mar.py --train_mode class as a user meets it: a run, a run that continues, what starts from it, and mistakes."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import main_mar
import scripts.sample
from engine.checkpoint.files import read_identity
from engine.checkpoint.load import export_weights
from scripts import cache_latents
from tests.helpers.class_folder import COLORS, write_class_folder
from tests.helpers.runs import assert_same
from tests.helpers.tiny_run import argv, load_checkpoint, read_metrics, write_world

NAMES = tuple(sorted(COLORS))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_world(tmp_path_factory.mktemp("world"))
    write_class_folder(root / "classes")
    return root


def flags(world: Path, output: str, **more: Any) -> list[str]:
    """Of a short run from scratch, with all that a stop could disturb."""
    values = {"train_mode": "class", "class_root": world / "classes", "class_num": 3, "resume": None, "log_freq": 1}
    values |= {"coco_root": None, "clip_path": None, "crop": "random", "proj_dropout": 0.1, "accum_iter": 2}
    return argv(world, output, **(values | more))


@pytest.fixture(scope="module")
def finished(world: Path) -> Path:
    """Three steps, the last of them in the second epoch."""
    previews = {"sample_freq": 3, "num_preview": 4, "num_iter": 2, "num_sampling_steps": 3, "cfg": 2.0}
    assert main_mar.main(flags(world, "whole", max_steps=3, **previews)) == 0
    return world / "whole" / "checkpoint-last.pth"


def test_what_a_run_leaves(world: Path, finished: Path) -> None:
    identity = read_identity(finished)
    assert identity is not None and identity.class_names == NAMES
    assert (identity.stage, identity.step, identity.categories, identity.text_encoder_id) == ("class", 3, (), "")
    checkpoint = load_checkpoint(world, "whole")
    assert set(checkpoint["model_ema"]) == set(checkpoint["model"]), "everything trains"
    assert float(checkpoint["model"]["encoder_blocks.0.attn.rope_strength"].mean()) == pytest.approx(1, abs=0.1)
    assert len(read_metrics(world, "whole")) == 3
    assert min(Image.open(finished.parent / "samples" / "step-0000003.png").size) > 32


@pytest.mark.parametrize("first", [1, 2])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(world: Path, finished: Path, first: int) -> None:
    output = f"parts{first}"
    main_mar.main(flags(world, output, max_steps=first))
    main_mar.main(flags(world, output, max_steps=3, num_iter=2, num_sampling_steps=3, cfg=2.0))
    states = [load_checkpoint(world, name) for name in ("whole", output)]
    for state in states:
        del state["args"]
    assert_same(*states)


def test_stage_1_starts_from_it(world: Path, finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its averaged weights, its rotations included; captions and boxes change nothing yet."""
    with caplog.at_level(logging.INFO):
        assert main_mar.main(argv(world, "stage1", resume=finished, class_num=3, max_steps=1)) == 0
    assert f"from the EMA weights of {finished} (stage 'class'" in caplog.text
    before, after = load_checkpoint(world, "whole"), load_checkpoint(world, "stage1")
    assert torch.equal(after["model"]["z_proj.weight"], before["model_ema"]["z_proj.weight"])
    assert float(after["model"]["encoder_blocks.0.attn.rope_strength"].min()) > 0.9
    assert "class_names" not in after


def test_it_is_exported_and_sampled_by_class(world: Path, finished: Path, tmp_path: Path) -> None:
    export_weights(finished, tmp_path / "mar.safetensors")
    identity = read_identity(tmp_path / "mar.safetensors")
    assert identity is not None and identity.class_names == NAMES
    for resume in (finished, tmp_path / "mar.safetensors"):
        words = ["--resume", resume, "--vae_path", world / "vae.ckpt", "--class_label", 2, "--num_images", 1]
        words += ["--num_iter", 2, "--num_sampling_steps", 3, "--output_dir", tmp_path / resume.stem, "--device", "cpu"]
        scripts.sample.main([str(word) for word in words])
    one, other = (Image.open(tmp_path / name / "0000.png").tobytes() for name in ("checkpoint-last", "mar"))
    assert one == other


def write_cache(world: Path, classes: Path, cache: Path) -> None:
    words = ["--class_root", classes, "--cached_path", cache, "--vae_path", world / "vae.ckpt"]
    words += ["--img_size", 32, "--num_workers", 0, "--device", "cpu"]
    cache_latents.main([str(word) for word in words])


def test_cached_training_is_uncached_training(world: Path) -> None:
    cache = world / "cache"
    write_cache(world, world / "classes", cache)
    plain = {"crop": "center", "max_steps": 2}
    main_mar.main(flags(world, "uncached", **plain))
    main_mar.main(flags(world, "cached", **plain, use_cached=True, cached_path=cache))
    one, other = ([line["loss"] for line in read_metrics(world, name)] for name in ("uncached", "cached"))
    assert other == pytest.approx(one, rel=1e-4)
    assert "9 of 9 pictures are here, and those it was made of" in (world / "cached" / "log.txt").read_text()
    said = fails(world, crop="random", use_cached=True, cached_path=cache)
    assert "caches hold centre crops" in said


def test_a_cache_of_other_pictures_is_refused(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "classes", tmp_path / "classes")
    write_cache(world, tmp_path / "classes", tmp_path / "cache")
    folder = tmp_path / "classes" / "train" / NAMES[0]
    Image.new("RGB", (40, 40)).save(folder / f"{NAMES[0]}_2.JPEG")
    cached = {"class_root": tmp_path / "classes", "cached_path": tmp_path / "cache", "use_cached": True}
    said = fails(world, crop="center", **cached)
    assert f"{NAMES[0]}_2.JPEG is not what the cache" in said
    Image.new("RGB", (40, 40)).save(folder / f"{NAMES[0]}_9.JPEG")
    assert "lacks 1 of the 10 items" in fails(world, crop="center", **cached)


def test_check_data_looks_and_does_not_train(world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert main_mar.main(flags(world, str(tmp_path / "out"), check_data=True)) == 0
    assert "9 pictures of 3 classes" in caplog.text and "9 pictures are there and whole" in caplog.text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checked.json"]


# --- mistakes ------------------------------------------------------------------------------------------------------


def fails(world: Path, **more: Any) -> str:
    with pytest.raises(SystemExit) as caught:
        main_mar.main(flags(world, "refused", **more))
    assert not (world / "refused").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"class_num": 5}, "the model has 5 classes"),
        ({"class_root": None}, "--train_mode class and --class_root belong together, got class and ''"),
        ({"train_mode": "full"}, "--train_mode class and --class_root belong together, got full and"),
        ({"class_root": "nowhere"}, "--class_root nowhere does not exist; it holds train/"),
        ({"text_drop_prob": 0.1}, "--text_drop_prob 0.1 does not go with --train_mode class"),
        ({"size_condition": True}, "--size_condition True does not go with --train_mode class"),
        ({"online_eval": True}, "--online_eval True does not go with --train_mode class"),
        ({"batch_size": 10}, "the dataset has 9 items, fewer than one global batch of 10"),
        ({"num_iter": 100, "sample_freq": 1}, "num_iter must lie between 1 and the number of tokens, 16, got 100"),
    ],
    ids=str,
)
def test_mistakes(world: Path, more: dict[str, Any], message: str) -> None:
    assert message in fails(world, **more)


def test_a_broken_picture_is_named_before_the_first_step(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "classes", tmp_path / "classes")
    picture = tmp_path / "classes" / "train" / NAMES[1] / f"{NAMES[1]}_1.JPEG"
    picture.write_bytes(picture.read_bytes()[:-30])
    assert f"{picture}: image file is truncated" in fails(world, class_root=tmp_path / "classes")


def test_a_run_goes_on_with_its_own_classes(world: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "classes", tmp_path / "classes")
    (tmp_path / "classes" / "train" / NAMES[1]).rename(tmp_path / "classes" / "train" / "n02_melon")
    said = fails(world, resume=finished, class_root=tmp_path / "classes")
    assert f"{finished} was trained on other classes: label 1 is 'n02_leaf', here 'n02_melon'" in said


def test_rotations_that_were_pretrained_are_not_dropped(world: Path, finished: Path) -> None:
    with pytest.raises(SystemExit, match="another architecture: rope_mode gated in the file, off here"):
        main_mar.main(argv(world, "refused", resume=finished, class_num=3, rope_mode="off"))
