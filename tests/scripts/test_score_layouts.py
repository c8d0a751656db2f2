"""scripts/score_layouts.py: planners and files, against the layouts of a split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import scripts.score_layouts
from tests.helpers.planners import write_planner
from tests.helpers.scene_files import CATEGORIES, write_coco
from tests.helpers.tiny import World, write_world
from util.types import Category


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = write_world(tmp_path_factory.mktemp("world"))
    write_coco(world.root / "coco")
    write_planner(world.root / "planner.safetensors", world, tuple(CATEGORIES))
    return world


def score(world: World, *flags: str) -> dict:
    output = world.root / "scores.json"
    common = ["--coco_root", str(world.root / "coco"), "--clip_path", str(world.clip), "--device", "cpu"]
    scripts.score_layouts.main([*common, "--img_size", "32", "--output", str(output), *flags])
    return json.loads(output.read_text())


def layout_file(world: World, *entries: tuple[str, list[tuple[str, list[float]]]]) -> Path:
    """Entries of captions and boxes."""
    path = world.root / "layouts.json"
    objects = [[{"label": label, "bbox": box} for label, box in boxes] for _, boxes in entries]
    prompts = [prompt for prompt, _ in entries]
    path.write_text(json.dumps([{"prompt": p, "objects": o} for p, o in zip(prompts, objects, strict=True)]))
    return path


def test_a_planner_stands_beside_its_bounds(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    results = score(world, "--planner_path", str(world.root / "planner.safetensors"))
    assert list(results["rows"]) == ["planner", "planner, other captions", "real, other captions", "real"]
    assert results["num_layouts"] == 2  # the image without boxes is left out
    assert results["rows"]["real"]["class_f1"] == results["rows"]["real"]["count_accuracy"] == 1
    assert results == score(world, "--planner_path", str(world.root / "planner.safetensors"))
    other = score(world, "--planner_path", str(world.root / "planner.safetensors"), "--seed", "1")
    assert other["rows"]["planner"] != results["rows"]["planner"]
    assert "| planner | " in capsys.readouterr().out


def test_a_file_is_compared_by_its_captions_in_any_order(world: World) -> None:
    dog = ("Caption 1 of 1.", [("dog", [0.0, 0.0, 0.5, 1.0])])  # another spelling of the same caption
    both = ("caption 0 of 3", [("person", [0.5, 0.5, 1.0, 1.0]), ("sports ball", [0.1, 0.1, 0.9, 0.9])])
    rows = score(world, "--layout", str(layout_file(world, both, dog)))["rows"]
    assert rows["file"]["class_f1"] == rows["file"]["count_accuracy"] == 1 and rows["file"]["miou"] > 0.5
    assert rows["file, other captions"]["class_f1"] < 1


def test_boxes_of_a_file_may_be_in_other_formats(world: World) -> None:
    path = world.root / "gpt.json"
    path.write_text(json.dumps([{"query_id": 1, "prompt": "caption 0 of 1", "object_list": [["dog", [0, 0, 0.5, 1]]]}]))
    assert score(world, "--layout", str(path))["rows"]["file"]["class_f1"] == 1


def test_mistakes_are_one_line(world: World) -> None:
    planner = str(world.root / "planner.safetensors")
    other = str(write_planner(world.root / "other.safetensors", world, (Category(1, "zebra"), Category(2, "dog"))))
    strange = str(layout_file(world, ("what is this", [])))
    for flags, message in (
        ([], "exactly one of --planner_path and --layout; got none"),
        (["--planner_path", planner, "--layout", strange], "got both"),
        (["--planner_path", "nowhere"], "planner not found: nowhere"),
        (["--planner_path", other], "places 'zebra', which these weights do not know"),
        (["--layout", strange], "the prompt 'what is this' is no caption"),
        (["--planner_path", planner, "--layout_format", "gligen"], "--layout_format gligen needs --layout"),
    ):
        with pytest.raises(SystemExit) as error:
            score(world, *flags)
        assert message in str(error.value) and "\n" not in str(error.value)
