"""scripts/sample.py --layout auto, and the same from Python: each image gets a layout of its own, by its own seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import scripts.sample
from engine.sample.pipeline import StructMARPipeline
from tests.helpers.planners import write_planner
from tests.helpers.scene_files import write_coco
from tests.helpers.tiny import World, write_world
from util.types import Category

FAST = ["--num_iter", "4", "--num_sampling_steps", "2", "--clip_x0", "3", "--device", "cpu"]
OPTIONS: dict[str, Any] = {"num_inference_steps": 4, "num_diffusion_steps": 2, "clip_x0": 3.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = write_world(tmp_path_factory.mktemp("world"))
    write_planner(world.root / "planner.safetensors", world)
    return world


@pytest.fixture(scope="module")
def pipe(world: World) -> StructMARPipeline:
    planner = world.root / "planner.safetensors"
    pipe = StructMARPipeline.from_checkpoint(world.checkpoint, world.vae, world.clip, planner_path=planner)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(world: World, out: Path, *flags: str) -> list[dict]:
    """Runs the script; returns the images' entries."""
    weights = ["--resume", str(world.checkpoint), *world.frozen_flags()]
    scripts.sample.main([*weights, *FAST, "--output_dir", str(out), *flags])
    return json.loads((out / "samples.json").read_text())["images"]


def auto(world: World) -> list[str]:
    return ["--layout", "auto", "--planner_path", str(world.root / "planner.safetensors")]


def pixels(image: Any) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_images_have_layouts_of_their_own_that_can_be_drawn_again(world: World, tmp_path: Path) -> None:
    images = draw(world, tmp_path / "a", "--prompt", "a red dog", *auto(world), "--num_images", "4", "--seed", "5")
    layouts = [json.dumps(image["objects"]) for image in images]
    assert len(set(layouts)) > 1 and any(image["objects"] for image in images)
    later = draw(world, tmp_path / "b", "--prompt", "a red dog", *auto(world), "--num_images", "1", "--seed", "7")
    assert later[0]["objects"] == images[2]["objects"]  # by the image's seed alone
    given = tmp_path / "layout.json"
    given.write_text(json.dumps({"prompt": "a red dog", "objects": images[2]["objects"]}))
    draw(world, tmp_path / "c", "--layout", str(given), "--num_images", "1", "--seed", "7")
    again, first = (pixels(Image.open(tmp_path / name / "0000.png")) for name in ("b", "c"))
    assert (again == first).all()


def test_captions_of_a_dataset_get_proposed_boxes(world: World, tmp_path: Path) -> None:
    write_coco(tmp_path / "coco")
    data = ["--coco_root", str(tmp_path / "coco"), "--coco_split", "val2017", "--num_images", "2"]
    real, planned = (draw(world, tmp_path / name, *data, *more) for name, more in (("r", []), ("p", auto(world))))
    assert [each["prompt"] for each in planned] == [each["prompt"] for each in real]
    assert [each["objects"] for each in planned] != [each["objects"] for each in real]


def test_mistakes_are_one_line_before_anything_is_drawn(world: World, tmp_path: Path) -> None:
    other = str(write_planner(world.root / "zebra.safetensors", world, (Category(1, "zebra"),)))
    foreign = str(write_planner(world.root / "foreign.safetensors", world, text_encoder_id="1234567890abcdef"))
    prompt = ["--prompt", "a dog"]
    for flags, message in (
        ([*prompt, "--layout", "auto"], "--layout auto needs --planner_path"),
        ([*prompt, "--planner_path", other], "needs --layout auto, got --layout None"),
        (auto(world), "--layout auto needs a caption"),
        (["--prompt", "", *auto(world)], "prompt 0 is empty"),
        ([*prompt, "--layout", "auto", "--planner_path", "nowhere"], "planner not found: nowhere"),
        ([*prompt, "--layout", "auto", "--planner_path", other], "places 'zebra', which these weights do not know"),
        ([*prompt, "--layout", "auto", "--planner_path", foreign], "by the text encoder 1234567890ab, these weights"),
        ([*prompt, *auto(world), "--layout_format", "gligen"], "--layout_format gligen needs --layout"),
    ):
        with pytest.raises(SystemExit) as error:
            draw(world, tmp_path / "out", *flags)
        assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_pipeline_proposes_where_nothing_is_said_of_boxes(
    world: World, pipe: StructMARPipeline, tmp_path: Path
) -> None:
    out = pipe("a red dog", seed=5, num_images_per_prompt=3, **OPTIONS)
    images = draw(world, tmp_path, "--prompt", "a red dog", *auto(world), "--num_images", "3", "--seed", "5")
    assert [scene.to_dict()["objects"] for scene in out.scenes] == [image["objects"] for image in images]
    for index, image in enumerate(out.images):
        assert (pixels(image) == pixels(Image.open(tmp_path / f"{index:04d}.png"))).all()


def test_none_asks_for_boxes_and_an_empty_list_is_none(pipe: StructMARPipeline) -> None:
    mine = [[0.1, 0.1, 0.6, 0.9]]
    prompts = ["a red dog", "a dog", "a ball", ""]
    out = pipe(prompts, boxes=[None, [], mine, None], phrases=[None, [], ["dog"], None], seed=5, **OPTIONS)
    assert [len(scene.layout) for scene in out.scenes][1:] == [0, 1, 0]
    assert out.scenes[0].to_dict() == pipe("a red dog", seed=5, **OPTIONS).scenes[0].to_dict()
    assert len(pipe("a red dog", boxes=[], phrases=[], seed=5, **OPTIONS).scenes[0].layout) == 0


def test_without_a_planner_no_boxes_are_none(world: World) -> None:
    pipe = StructMARPipeline.from_checkpoint(world.checkpoint, world.vae, world.clip)
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe("a red dog", seed=5, **OPTIONS).scenes[0].layout) == 0


def test_a_picture_that_is_edited_gets_no_proposal(pipe: StructMARPipeline) -> None:
    picture, hole = np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32), bool)
    hole[8:20, 8:20] = True
    out = pipe("a red dog", image=picture, mask=hole, seed=5, **OPTIONS)
    assert len(out.scenes[0].layout) == 0


def test_a_temperature_below_zero_is_refused(pipe: StructMARPipeline) -> None:
    with pytest.raises(ValueError, match="temperature must not be negative, got -1"):
        pipe("a red dog", planner_temperature=-1, seed=0, **OPTIONS)
