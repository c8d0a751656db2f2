"""Auto layout guidance as users ask for it: the script's flags and the pipeline's arguments."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import scripts.sample
from engine.sample.pipeline import StructMARPipeline
from tests.helpers.tiny import World, write_world

QUICK = ["--num_iter", "4", "--num_sampling_steps", "2", "--clip_x0", "3", "--num_images", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world"))


def script_image(world: World, out: Path, *flags: str) -> np.ndarray:
    source = ["--resume", str(world.checkpoint), *world.frozen_flags(), "--layout", str(world.layout)]
    scripts.sample.main([*source, *QUICK, "--output_dir", str(out), *flags])
    return np.asarray(Image.open(out / "0000.png")).astype(int)


def test_flags_and_arguments_draw_the_same(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another image than without; the log says how many boxes the captions name."""
    flags = ["--mask_threshold", "0.4", "--start_step", "1", "--auto_update"]
    with caplog.at_level(logging.INFO):
        found = script_image(world, tmp_path / "auto", *flags)
    assert "the captions name 1 of 2 boxes" in caplog.text  # "a dog and a ball", of which one is a sports ball
    assert np.abs(found - script_image(world, tmp_path / "plain")).max() > 5
    pipe = StructMARPipeline.from_checkpoint(world.checkpoint, world.vae, world.clip)
    pipe.set_progress_bar_config(disable=True)
    boxes, phrases = [[0.1, 0.3, 0.5, 0.9], [0.6, 0.1, 0.9, 0.4]], ["dog", "sports ball"]
    sizes = {"num_inference_steps": 4, "num_diffusion_steps": 2, "clip_x0": 3.0}
    given = {"mask_threshold": 0.4, "start_step": 1, "auto_update": True, "seed": 0, **sizes}
    (image,) = pipe("a dog and a ball", boxes, phrases, **given).images
    assert np.array_equal(np.asarray(image).astype(int), found)
    with pytest.raises(ValueError, match="start_step 1 needs mask_threshold"):
        pipe("a dog", start_step=1)


def test_mistakes_name_the_flag(world: World, tmp_path: Path) -> None:
    for flags, message in (
        (["--mask_threshold", "0.4"], "--start_step, an iteration from 1 to"),
        (["--mask_threshold", "0.4", "--start_step", "4"], "got 4"),
        (["--start_step", "2"], "needs --mask_threshold"),
    ):
        with pytest.raises(SystemExit) as error:
            script_image(world, tmp_path / "out", *flags)
        assert message in str(error.value)
