"""What phrases decide in the mini world: evaluations that differ in one thing each, resumable, and their table."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from engine.eval.targets import load_eval_set
from scripts import evaluate_layout
from scripts.mini.phrase_results import phrases_table
from scripts.mini.phrases_table import WAYS, parse_args
from tests.conftest import ROOT
from tests.helpers.eval_world import evaluate, tiny_profile, write_dataset
from tests.helpers.script_tree import ScriptTree
from util.config import parse_args as parse_flags

FAKE_PYTHON = """
case "$*" in
    *evaluate_layout*) case "$folder" in *"${FAIL_AT:-nowhere}") exit 7 ;; esac; mkdir -p "$folder"
        touch "$folder/results.json" ;;
esac
"""
script_tree = partial(ScriptTree, script="phrases.sh", root_variable="PHRASES_ROOT", fake_python=FAKE_PYTHON)


def evaluations(lines: Sequence[str]) -> list[list[str]]:
    return [shlex.split(line) for line in lines if line.startswith("-m scripts.evaluate_layout ")]


def test_the_ways_differ_in_captions_boxes_and_weights_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"WEIGHTS": "with.safetensors", "BEFORE": "before.safetensors"}
    code, lines = script_tree(tmp_path / "tree").run(IMAGES="20", **weights)
    assert code == 0
    monkeypatch.chdir(ROOT)
    asked = [parse_flags(evaluate_layout.get_parser(), words[2:]) for words in evaluations(lines)]
    found = {args.name: (Path(args.coco_root).name.split("_")[-1], args.boxes_by, args.resume) for args in asked}
    assert list(found) == list(WAYS)
    for way, (captions, boxes_by, resume) in found.items():
        assert way.removeprefix("before_") == f"{captions}_{boxes_by}"
        assert resume == ("before.safetensors" if way.startswith("before") else "with.safetensors")
    own = {"name", "coco_root", "boxes_by", "resume", "output_dir"}
    shared = [{name: value for name, value in vars(args).items() if name not in own} for args in asked]
    assert all(each == shared[0] for each in shared)
    made = [line for line in lines if "make_dataset" in line]
    assert [("--no-colour_words" in line, "--num_val 20" in line) for line in made] == [(False, True), (True, True)]
    table = parse_args(shlex.split(lines[-1])[2:])
    assert table.ways == list(WAYS) and {args.output_dir for args in asked} == {str(table.runs / way) for way in WAYS}


def test_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    tree = script_tree(tmp_path / "tree")
    code, lines = tree.run(FAIL_AT="named_phrase")
    assert code == 7 and len(evaluations(lines)) == 3
    code, lines = tree.run()
    assert code == 0 and len(evaluations(lines)) == 5 and "phrases_table" in lines[-1]
    code, lines = tree.run("--fast")
    assert code == 2 and lines == []


def write_colours(folder: Path, value: float) -> None:
    share = {"value": value, "low": value - 0.1, "high": value + 0.1}
    rows = [{"kind": kind, "accuracy": share, "accuracy_several": share} for kind in ("model", "bound")]
    counts = {"num_images": 4, "num_objects": 9, "num_determined": 6}
    (folder / "colour.json").write_text(json.dumps({"format": "structmar-colour-1", "rows": rows, **counts}))


def test_the_table_has_a_line_for_each_way_and_the_bound(tmp_path: Path) -> None:
    eval_set = load_eval_set(write_dataset(tmp_path / "coco"), tiny_profile())
    for shift, way in enumerate(("named_class", "silent_phrase")):
        write_colours(evaluate(tmp_path / way, eval_set, way, 3 * shift), 0.4 + shift / 10)
    lines = phrases_table(tmp_path, ["named_class", "silent_phrase"]).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert [row[0] for row in rows[2:]] == [WAYS["named_class"], WAYS["silent_phrase"], "real drawings"]
    assert rows[2][2:] == ["40.0 [30.0, 50.0]"] * 2 and rows[3][2:] == ["50.0 [40.0, 60.0]"] * 2
    assert rows[3][1] != rows[2][1]
    assert "9 objects with a colour, 3 of them beside another colour of their class" in lines[-1]
    (tmp_path / "named_class" / "colour.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="has format 'other', expected 'structmar-colour-1'"):
        phrases_table(tmp_path, ["named_class", "silent_phrase"])
