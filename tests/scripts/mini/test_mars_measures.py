"""What captions and pictures tell of a scene, how that is counted, and the commands from end to end."""

from __future__ import annotations

import json
from collections import Counter
from multiprocessing import dummy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from models.frozen.causal_lm import open_causal_lm
from models.frozen.detections import Detections
from scripts.mini import caption_accuracy, drawing_accuracy, mars_table, text_equality
from scripts.mini.colours import load_colour_set
from scripts.mini.dataset import DatasetSettings, add_chinese, make_dataset
from scripts.mini.drawing import CLASSES
from scripts.mini.drawn import Judge
from scripts.mini.kinds import Kind, Kinds, Tally, kinds_of_caption, load_scene_kinds, result_row, tally
from scripts.mini.unchanged import answers_to, changed_weights
from tests.helpers.mars_world import SIDE, MarsWorld, tiny_model, write_mars
from util.images import load_image

NUM_SCENES = 12
RED, YELLOW, APPLE, CLOCK = Kind("kite", "red"), Kind("kite", "yellow"), Kind("apple", "green"), Kind("clock", None)


def kinds(*found: Kind) -> Kinds:
    return Counter(found)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, settings = tmp_path_factory.mktemp("scenes"), DatasetSettings(num_train=1, num_val=NUM_SCENES, seed=5)
    with pytest.MonkeyPatch.context() as patch:
        threads = SimpleNamespace(get_context=lambda _: dummy)  # no processes to start
        patch.setattr("scripts.mini.dataset.multiprocessing", threads)
        make_dataset(root, settings)
        add_chinese(root, settings)
    return root


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> MarsWorld:
    return write_mars(tmp_path_factory.mktemp("mars"))


@pytest.mark.parametrize(
    ("caption", "found"),
    [
        ("two large red kites and an orange on a beach", {RED: 2, Kind("orange", None): 1}),
        ("an orange umbrella", {Kind("umbrella", "orange"): 1}),
        ("a red kite above a clock, with two red kites, in the sky", {RED: 3, CLOCK: 1}),
        ("three objects: two red kites and a clock", {RED: 2, CLOCK: 1}),
        ("kites, a red one", {}),
        ("沙滩上有两个红色的大风筝和一个时钟", {RED: 2, CLOCK: 1}),
        ("三个物体：一个时钟、一个绿色的小苹果和一个小时钟", {CLOCK: 2, APPLE: 1}),
    ],
)
def test_a_caption_is_read_by_its_numbers_colours_and_nouns(caption: str, found: dict[Kind, int]) -> None:
    assert kinds_of_caption(caption) == Counter(found)


def test_the_datasets_own_captions_say_exactly_what_is_there(root: Path) -> None:
    scenes = load_scene_kinds(root, "val2017", NUM_SCENES)
    for scene in scenes:
        for captions in scene.captions.values():
            assert len(captions) == 5
            assert [kinds_of_caption(caption) for caption in captions] == [scene.kinds] * 5


def test_a_scene_is_counted_by_hand() -> None:
    scene = kinds(RED, RED, YELLOW, CLOCK)
    assert tally(scene, scene) == Tally(4, 4, 4, 2, 2, 3, 3, 1)
    assert tally(scene, kinds(RED, APPLE)) == Tally(4, 1, 2, 2, 0, 1, 1, 0)
    assert tally(scene, kinds(YELLOW, YELLOW, YELLOW, CLOCK)) == Tally(4, 4, 4, 2, 2, 3, 1, 0)
    assert tally(kinds(CLOCK), kinds()) == Tally(1, 0, 0, 1, 0, 0, 0, 0)


def test_shares_are_of_all_scenes_together() -> None:
    tallies = [tally(kinds(CLOCK), kinds(CLOCK)), tally(kinds(RED, RED, APPLE), kinds(RED))]
    row = result_row(tallies, np.array([[1, 1], [2, 0], [0, 2]]))
    assert {name: each["value"] for name, each in row.items()} == {
        "objects": 0.5, "precision": 1.0, "counts": 1 / 3, "colours": 1.0, "exact": 0.5,
    }  # fmt: skip
    assert row["objects"]["low"] < 0.5 < row["objects"]["high"]


def test_finds_have_the_colours_of_their_pixels(root: Path) -> None:
    """Real drawings in their real boxes: nearly all are read rightly, as scripts.mini.colour_accuracy does."""
    colour_set = load_colour_set(root, "val2017")
    ids = {each.name: each.id for each in CLASSES}
    content = json.loads((root / "annotations" / "instances_val2017.json").read_text())
    total = right = 0
    for scene in load_scene_kinds(root, "val2017", NUM_SCENES):
        own = [each for each in content["annotations"] if each["image_id"] == scene.image_id]
        boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (each["bbox"] for each in own)])
        found = Detections(boxes, torch.tensor([each["category_id"] for each in own]), torch.ones(len(own)))
        judge = Judge(lambda _, found=found: [found], colour_set.coverage, 0.5, torch.device("cpu"))
        seen = judge.kinds(np.asarray(load_image(scene.path)))
        assert {ids[kind.noun] for kind in seen} == {each["category_id"] for each in own}
        total, right = total + scene.kinds.total(), right + (scene.kinds & seen).total()
    assert right >= 0.85 * total


def test_a_changed_weight_is_found(world: MarsWorld) -> None:
    base, (model, _) = open_causal_lm(world.lm, torch.float32), tiny_model(world)
    weights = base.lm.state_dict()
    assert changed_weights(weights, model.lm.state_dict()) == []
    starts = [[0, 5, 6], [0, 7, 8], [0, 9]]
    together = answers_to(base.lm, starts, 1, 6, batch_size=2)
    assert together == answers_to(model.lm, starts, 1, 6, batch_size=2)
    assert [answers_to(base.lm, [start], 1, 6, batch_size=1)[0] for start in starts] == together
    assert all(len(row) <= len(start) + 6 and 1 not in row for row, start in zip(together, starts, strict=True))
    name = next(name for name, _ in base.lm.named_parameters() if "q_proj" in name)
    with torch.no_grad():
        base.lm.get_parameter(name)[0, 0] += 1
    assert changed_weights(base.lm.state_dict(), model.lm.state_dict()) == [name]


def test_the_commands_end_to_end(
    root: Path, world: MarsWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*world.flags(), "--coco_root", str(root), "--num_scenes", "3", "--num_resamples", "5"]
    files = {name: str(tmp_path / f"{name}.json") for name in ("captions", "drawings", "text")}
    caption_accuracy.main([*flags, "--max_words", "4", "--output", files["captions"]])
    drawing_accuracy.main([*flags, "--output", files["drawings"], "--grid", str(tmp_path / "grid.png")])
    text_equality.main([*flags, "--max_words", "3", "--output", files["text"]])
    told = {name: json.loads(Path(path).read_text()) for name, path in files.items()}
    assert told["captions"]["rows"]["English, the dataset's own"]["exact"]["value"] == 1
    assert len(told["captions"]["examples"]["Chinese"]) == 3
    assert told["drawings"]["rows"]["MARS, Chinese"]["seconds_an_image"] > 0
    assert load_image(tmp_path / "grid.png").width > 3 * SIDE
    assert told["text"]["texts"] == told["text"]["answers_equal"] == 6
    assert told["text"]["logits_equal"] == told["text"]["logits"]
    assert told["text"]["weights_equal"] == told["text"]["weights"]
    capsys.readouterr()
    mars_table.main([word for name, path in files.items() for word in (f"--{name}", path)])
    table = capsys.readouterr().out
    assert "| English, MARS |" in table and "| MARS, Chinese |" in table and "answers: 6 of 6 equal" in table
    with pytest.raises(SystemExit, match=r"captions\.json has format 'structmar-mini-captions-1', not"):
        mars_table.main(["--captions", files["captions"], "--drawings", files["captions"], "--text", files["text"]])
