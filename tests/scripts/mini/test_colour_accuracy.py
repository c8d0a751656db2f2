"""The colour yardstick: right on the real drawings, at chance on others' pictures, and its counts add up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from scripts.mini import colour_accuracy
from scripts.mini.colours import (
    GRID,
    NONE,
    ColourSet,
    Item,
    accuracy,
    box_weights,
    hidden_share,
    judge,
    load_colour_set,
    name_colour,
    read_pictures,
    result_row,
    shifted,
    to_lab,
)
from scripts.mini.dataset import DatasetSettings, make_dataset
from scripts.mini.drawing import CLASS_BY_ID, COLOURS
from util.images import save_png

BALL, KITE = 37, 38
EIGHT = CLASS_BY_ID[KITE].colours


def flat(rgb: tuple[float, float, float], side: int = 6) -> np.ndarray:
    return np.broadcast_to(np.array(rgb, dtype=np.float32), (side, side, 3))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("colours") / "mini"
    (folder / "annotations").mkdir(parents=True)
    make_dataset(folder, DatasetSettings(num_train=1, num_val=40))
    return folder


def test_shaded_palette_colours_are_named() -> None:
    """Light or dark, and with a colour cast as the drawings' own jitter."""
    weights = np.ones((6, 6), dtype=np.float32)
    for name in EIGHT:
        for shade in (0.5, 0.8, 1.0):
            red, green, blue = (min(value * shade, 1) for value in COLOURS[name])
            rgb = (min(red + 0.02, 1), max(green - 0.02, 0), blue)
            assert name_colour(to_lab(flat(rgb)), weights, EIGHT) == name


def test_only_weighted_near_pixels_vote_and_the_most_win() -> None:
    picture = flat(COLOURS["red"], 4).copy()
    picture[:2] = COLOURS["blue"]
    weights = np.ones((4, 4), dtype=np.float32)
    weights[0] = 0
    assert name_colour(to_lab(picture), weights, EIGHT) == "red"  # 8 of 12
    weights[3] = 0
    weights[2, :2] = 0
    assert name_colour(to_lab(picture), weights, EIGHT) == "blue"  # 4 of 6
    assert name_colour(to_lab(picture), np.zeros((4, 4), dtype=np.float32), EIGHT) == NONE
    assert name_colour(to_lab(flat(COLOURS["blue"])), np.ones((6, 6), dtype=np.float32), ("red", "yellow")) == NONE
    black = to_lab(flat((0.03, 0.03, 0.03)))
    assert name_colour(black, np.ones((6, 6), dtype=np.float32), EIGHT) == NONE


def test_weights_are_where_the_class_covers_its_box() -> None:
    coverage = np.zeros((GRID, GRID), dtype=np.float32)
    coverage[:, : GRID // 2] = 0.6
    coverage[: GRID // 2, : GRID // 2] = 0.5  # below 0.85 of 0.6
    weights = box_weights(coverage, (3, 4, 8, 6))
    assert weights.shape == (6, 8) and weights[3:, :4].all() and weights.sum() == 12


def test_hidden_share_by_hand() -> None:
    assert hidden_share((0, 0, 10, 10), []) == 0
    assert hidden_share((0, 0, 10, 10), [(20, 20, 5, 5), (5, 5, 10, 10), (-5, 0, 8, 10)]) == pytest.approx(0.3)


def test_covered_objects_are_left_out_and_counted(root: Path, tmp_path: Path) -> None:
    """A nearer box, later in the file, covers the first coloured object; the same box farther away would not."""
    path = root / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    before = load_colour_set(root, "val2017")
    first = next(entry for entry in content["annotations"] if entry.get("colour"))
    (tmp_path / "annotations").mkdir()
    for identity, hidden in ((10**6, 1), (0, 0)):
        cover = {key: value for key, value in first.items() if key != "colour"} | {"id": identity}
        altered = content | {"annotations": [cover, *content["annotations"]]}
        (tmp_path / "annotations" / path.name).write_text(json.dumps(altered))
        found = load_colour_set(tmp_path, "val2017")
        assert found.num_hidden == before.num_hidden + hidden
        assert len(found.items) == len(before.items) - hidden


def test_real_drawings_are_right_and_others_are_not(root: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "colour.json"
    pictures = read_pictures(root / "val2017", load_colour_set(root, "val2017"))
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, shown in zip(folders, (pictures, shifted(pictures)), strict=True):
        folder.mkdir()
        for image_id, picture in shown.items():
            save_png(picture, folder / f"{image_id:012d}.png", {})
    argv = ["--coco_root", str(root), "--output", str(output), "--num_resamples", "50", "--images"]
    colour_accuracy.main([*argv, *map(str, folders)])
    results = json.loads(output.read_text())
    real, images, control = results["rows"]
    assert [row["kind"] for row in results["rows"]] == ["bound", "model", "control"]
    assert real["accuracy"]["value"] >= 0.95 and control["accuracy"]["value"] < 0.5
    both = (real["accuracy"]["value"] + control["accuracy"]["value"]) / 2
    assert images["num_seeds"] == 2 and images["accuracy"]["value"] == pytest.approx(both)
    for row in results["rows"]:
        assert row["accuracy"]["low"] <= row["accuracy"]["value"] <= row["accuracy"]["high"]
        total = results["num_objects"] * row["num_seeds"]
        for part in ("per_class", "per_colour"):
            assert sum(entry["count"] for entry in row[part].values()) == total
        assert sum(n for said in row["confusion"].values() for n in said.values()) == total


def test_accuracy_and_interval_by_hand() -> None:
    """Image 5 has two objects, image 9 one. Two seeds: 2 + 0 right in image 5, 1 + 0 in image 9."""
    items = (
        Item(5, BALL, "red", (0, 0, 4, 4)), Item(5, KITE, "blue", (4, 0, 4, 4)), Item(9, KITE, "red", (0, 0, 4, 4)),
    )  # fmt: skip
    colour_set = ColourSet(Path("f"), "val", {5: "5.jpg", 9: "9.jpg"}, (8, 8), items, {}, 0)
    runs = [["red", "blue", "red"], ["blue", NONE, "green"]]
    row = result_row("x", "model", colour_set, runs, np.array([[2, 0], [0, 2], [1, 1]]))
    assert row["accuracy"]["value"] == 0.5  # 3 of 6; the resamples: 2 of 4, 1 of 2, 3 of 6
    assert (row["accuracy"]["low"], row["accuracy"]["high"]) == (0.5, 0.5)
    assert row["per_class"] == {
        "kite": {"count": 4, "accuracy": 0.5}, "sports ball": {"count": 2, "accuracy": 0.5},
    }  # fmt: skip
    assert row["confusion"] == {"red": {"blue": 1, "green": 1, "red": 2}, "blue": {"blue": 1, NONE: 1}}


def test_judge_looks_into_the_right_box() -> None:
    picture = np.zeros((8, 8, 3), dtype=np.uint8)
    picture[1:5, 3:7] = np.round(255 * np.array(COLOURS["purple"]))
    coverage = {KITE: np.ones((GRID, GRID), dtype=np.float32)}
    for box, said in (((3, 1, 4, 4), "purple"), ((0, 5, 3, 3), NONE)):
        one = ColourSet(Path("f"), "val", {1: "1.jpg"}, (8, 8), (Item(1, KITE, "purple", box),), coverage, 0)
        assert judge(one, {1: picture}) == [said]


def test_mistakes_are_named(root: Path, tmp_path: Path) -> None:
    colour_set = load_colour_set(root, "val2017", 2)
    with pytest.raises(FileNotFoundError, match=r"image 1: neither .*000000000001.png nor .*000000000001.jpg exists"):
        read_pictures(tmp_path, colour_set)
    save_png(np.zeros((32, 32, 3), dtype=np.uint8), tmp_path / "000000000001.png", {})
    with pytest.raises(ValueError, match=r"000000000001.png is \(32, 32\) .* are \(64, 64\)"):
        read_pictures(tmp_path, colour_set)
    with pytest.raises(SystemExit, match=r"instances_val2014.json does not exist"):
        colour_accuracy.main(["--coco_root", str(root), "--split", "val2014"])


def test_two_colours_of_one_class_are_not_determined(root: Path) -> None:
    """ "a red apple and a green apple" does not say which box is which; two red ones are both red."""
    content = json.loads((root / "annotations" / "instances_val2017.json").read_text())
    found = load_colour_set(root, "val2017")
    for item in found.items:
        same = {
            entry["colour"]
            for entry in content["annotations"]
            if entry["image_id"] == item.image_id and entry["category_id"] == item.category_id
        }
        assert item.is_determined == (len(same) == 1)
    weights = np.array([[1, 1], [2, 0]])
    right, index = np.array([True, False, True]), np.array([0, 0, 1])
    assert accuracy(right, index, weights).value == pytest.approx(2 / 3)
    assert accuracy(right, index, weights).low == pytest.approx(0.5, abs=0.01)
