"""scripts.compare on evaluations that took place: the numbers are the evaluations' own, differences are paired."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import scripts.compare
from engine.eval.compare import MEASURES, PRECISIONS, compare, format_comparison, load_evaluation, measure
from engine.eval.targets import load_eval_set
from tests.helpers.eval_world import evaluate, tiny_profile, write_dataset

LAYOUT = {"mIoU": "mIoU", "SR50": "SR50", "SR50 image": "SR50_image", "extra/image": "extra_rate"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("compare")
    eval_set = load_eval_set(write_dataset(root / "coco"), tiny_profile())
    return [evaluate(root / name, eval_set, name, shift) for name, shift in (("exact", 0), ("near", 2), ("far", 6))]


@pytest.fixture
def copies(folders, tmp_path) -> list[Path]:
    return [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in folders]


def test_numbers_and_intervals_are_the_evaluations_own(folders):
    for folder, row in zip(folders, [r for r in compare(folders)["rows"] if r["kind"] == "model"], strict=True):
        results = json.loads((folder / "results.json").read_text())
        said = next(each for each in results["rows"] if each["kind"] == "model")
        places = PRECISIONS | {name: ("layout", key) for name, key in LAYOUT.items()}
        for name, (part, key) in places.items():
            assert row["metrics"][name] == pytest.approx(said[part][key]), (folder, name)


def test_differences_are_of_the_same_images(folders):
    """Resample by resample; a model has no distance from its own copy, however wide its interval."""
    comparison = compare(folders)
    rows = [row for row in comparison["rows"] if row["kind"] == "model"]
    assert [row["name"] for row in rows] == ["exact", "near", "far"] and "difference" not in rows[0]
    first, far = (measure(load_evaluation(folder, 60), folder.name) for folder in (folders[0], folders[2]))
    for name in MEASURES:
        samples = far[name].samples - first[name].samples
        found = rows[2]["difference"][name]
        assert found["value"] == pytest.approx(far[name].value - first[name].value)
        assert (found["low"], found["high"]) == pytest.approx(tuple(np.percentile(samples, [2.5, 97.5])))
    assert rows[2]["difference"]["mIoU"]["high"] < 0
    assert [row["name"] for row in comparison["rows"] if row["kind"] == "bound"] == ["real images"]


def test_a_copy_does_not_differ(folders, tmp_path):
    twin = Path(shutil.copytree(folders[2], tmp_path / "twin"))
    rows = compare([folders[2], twin])["rows"][-2:]
    assert [row["name"] for row in rows] == [f"far ({folders[2]})", f"far ({twin})"]
    assert {tuple(each.values()) for each in rows[1]["difference"].values()} == {(0.0, 0.0, 0.0)}


def test_the_script_prints_one_table(folders, tmp_path, capsys):
    files = ["--output", str(tmp_path / "table.md"), "--json", str(tmp_path / "table.json")]
    scripts.compare.main([*map(str, folders), *files])
    text = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() == text
    assert json.loads((tmp_path / "table.json").read_text())["rows"][1]["name"] == "exact"
    table = [line for line in text.splitlines() if line.startswith("| ")]
    names = ["", "real images", "exact", "near", "minus exact", "far", "minus exact"]
    assert [line.split("|")[1].strip() for line in table] == names
    assert len({len(line) for line in table}) == 1
    assert all("[" in line for line in table[1:]) and "profile tiny" in text


def change(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r["profile"].update(hash="0" * 12), "its profile's hash is '000000000000', there it is '"),
        (lambda r: r["dataset"].update(ids_hash="0" * 12), "its image ids' hash is '000000000000', there it is '"),
        (lambda r: r["dataset"].update(split="train"), "its split is 'train', there it is 'val2017'"),
        (lambda r: r["detector"].update(id="x"), "its detector is 'x', there it is '0000"),
        (lambda r: r["detector"].update(unknown_categories=["dog"]), r"its left out categories is \['dog'\]"),
        (lambda r: r.update(num_resamples=7), "its number of resamples is 7, there it is 60"),
        (lambda r: r["files"].pop("ground_truth_full.json"), "its ground_truth_full.json's sha256 is 'None'"),
        (lambda r: r["rows"][1]["layout"]["mIoU"].update(value=0.99), "mIoU of row 'near' is 0.990000, but the detect"),
        (lambda r: r.update(format="x"), "has format 'x', expected 'structmar-eval-1'"),
        (lambda r: r.pop("files"), "does not say which files its numbers are of"),
        (lambda r: r.pop("profile"), "has no profile.name; evaluate again"),
        (lambda r: r["rows"][1].pop("layout"), r"results.json is not as it was written \(KeyError: 'layout'\)"),
        (lambda r: r.update(rows="x"), r"results.json is not as it was written \(TypeError"),
        (lambda r: r.update(rows=[]), r"expected one row of a model, found \[\]"),
    ],
)
def test_what_does_not_belong_together_is_refused(copies, edit, message):
    change(copies[1] / "results.json", edit)
    with pytest.raises(ValueError, match=message) as error:
        compare(copies)
    assert str(copies[1]) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["detections/far.json", "per_image.jsonl", "ground_truth_conditioned.json"])
def test_a_file_that_was_changed_or_is_gone_is_named(copies, name):
    path = copies[2] / name
    path.write_text(path.read_text().replace("1", "2", 1))
    with pytest.raises(ValueError, match=f"{name} is not what .*results.json was made of: its sha256"):
        compare(copies)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=name):
        compare(copies)


def test_folders_are_evaluations_and_different(folders, tmp_path):
    with pytest.raises(SystemExit, match="error: a comparison needs two folders or more, got 1"):
        scripts.compare.main([str(folders[0])])
    with pytest.raises(SystemExit, match="error: .* are the same folder"):
        scripts.compare.main([str(folders[0]), str(folders[0].parent / "near" / ".." / "exact")])
    with pytest.raises(SystemExit, match="error: .*nowhere is not a folder of an evaluation"):
        scripts.compare.main([str(folders[0]), str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="error: .*results.json does not exist"):
        scripts.compare.main([str(folders[0]), str(tmp_path)])


def test_numbers_that_are_undefined_are_dashes(folders, tmp_path):
    """Nothing is wanted where no box is large enough: no AP, no mIoU, and no difference of them."""
    root = folders[0].parent
    nothing = load_eval_set(root / "coco", tiny_profile(min_area=0.99, min_boxes=0))
    pair = [evaluate(tmp_path / name, nothing, name) for name in ("a", "b")]
    comparison = compare(pair)
    assert np.isnan(comparison["rows"][-1]["difference"]["mIoU"]["value"])
    assert "–" in format_comparison(comparison)


def test_another_name_leaves_no_detections_behind(folders, tmp_path):
    eval_set = load_eval_set(folders[0].parent / "coco", tiny_profile())
    out = tmp_path / "out"
    for name in ("first", "second"):
        evaluate(out, eval_set, name)
    assert sorted(path.name for path in (out / "detections").iterdir()) == ["real_images.json", "second.json"]
