"""scripts/mini/mars.sh: what it asks of whom, in which order, and that it goes on where it stopped."""

from __future__ import annotations

import importlib
import shlex
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from engine.cli import validate_mars
from engine.cli.arguments import train_parser
from scripts import cache_latents
from scripts.mini import mars_table, train_lm
from tests.conftest import ROOT
from tests.helpers.script_tree import ScriptTree
from util.config import parse_args

MEASURES = ("caption_accuracy", "drawing_accuracy", "text_equality")
FAKE_PYTHON = """
case "$*" in
    *"${FAIL_AT:-nothing}"*) exit 7 ;;
    *_accuracy*|*text_equality*) mkdir -p "$(dirname "$file")"; touch "$file" ;;
esac
"""
script_tree = partial(ScriptTree, script="mars.sh", root_variable="MARS_ROOT", fake_python=FAKE_PYTHON)


def flags_of(lines: Sequence[str], program: str) -> list[list[str]]:
    """Of each call, in order."""
    return [shlex.split(line.partition(program)[2]) for line in lines if program in line]


def trainings(lines: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> list[Namespace]:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(validate_mars, "require_path", lambda *_: None)
    return [validate_mars.parse_train_args(train_parser(), words)[0] for words in flags_of(lines, "main_mar.py")]


def test_every_part_reads_what_the_one_before_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, lines = script_tree(tmp_path / "tree").run(STEPS="500", REFINE="80", IMAGES="7")
    assert code == 0
    joint, refine = trainings(lines, monkeypatch)
    assert (joint.train_mode, joint.epochs, refine.train_mode, refine.epochs) == ("joint", 2, "refine", 1)
    assert (joint.max_steps, refine.max_steps) == (None, None)  # to the end of the schedule
    assert refine.resume == f"{joint.output_dir}/checkpoint-last.pth" and joint.resume == ""
    lm = train_lm.parse_args(flags_of(lines, "-m scripts.mini.train_lm")[0])
    cached = parse_args(cache_latents.get_parser(), flags_of(lines, "-m scripts.cache_latents")[0])
    assert str(lm.output) == joint.lm_path and cached.cached_path == joint.cached_path and not cached.text
    assert (cached.vae_path, cached.img_size, cached.coco_root) == (joint.vae_path, joint.img_size, joint.coco_root)
    table = mars_table.parse_args(flags_of(lines, "-m scripts.mini.mars_table")[0])
    for name, read in zip(MEASURES, (table.captions, table.drawings, table.text), strict=True):
        module = importlib.import_module(f"scripts.mini.{name}")
        measured = module.parse_args(flags_of(lines, f"-m scripts.mini.{name}")[0])
        assert (measured.resume, measured.lm_path, measured.vae_path) == (
            refine.output_dir,
            joint.lm_path,
            joint.vae_path,
        )
        assert measured.vae_path == joint.vae_path
        assert (measured.num_scenes, str(measured.coco_root), measured.output) == (7, joint.coco_root, read)
    assert "--chinese" in flags_of(lines, "-m scripts.mini.make_dataset")[0]


def test_another_language_model_takes_the_place_of_the_small_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, lines = script_tree(tmp_path / "tree").run(LM="else")
    (joint,) = trainings(lines, monkeypatch)
    assert joint.lm_path == "else" and flags_of(lines, "scripts.mini.train_lm") == []
    assert all("--lm_path else " in line for name in MEASURES for line in lines if f"scripts.mini.{name} " in line)


@pytest.mark.parametrize("asked", [{"IMAGES": "250"}, {"REFINE": "375"}, {"REFINE": "375", "IMAGES": "250"}])
def test_what_else_is_asked_is_measured_anew(tmp_path: Path, asked: dict[str, str]) -> None:
    tree = script_tree(tmp_path / "tree")
    tables = []
    for own, calls in (({}, 1), (asked, 1), (asked, 0), ({}, 0)):
        code, lines = tree.run(IMAGES=own.get("IMAGES", "7"), REFINE=own.get("REFINE", "0"))
        assert code == 0 and [len(flags_of(lines, f"-m scripts.mini.{name} ")) for name in MEASURES] == 3 * [calls]
        tables.append(mars_table.parse_args(flags_of(lines, "-m scripts.mini.mars_table")[0]))
    first, other, again, back = tables
    assert first == back and other == again
    assert not set(vars(first).values()) & set(vars(other).values()) - {None, False}


def test_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    tree = script_tree(tmp_path / "tree")
    code, lines = tree.run(FAIL_AT="text_equality")
    assert code == 7 and [len(flags_of(lines, f"scripts.mini.{name} ")) for name in MEASURES] == [1, 1, 1]
    code, lines = tree.run()
    assert code == 0 and [len(flags_of(lines, f"-m scripts.mini.{name} ")) for name in MEASURES] == [0, 0, 1]
    assert "mars_table" in lines[-1]
    code, lines = tree.run("--fast")
    assert code == 2 and lines == []
