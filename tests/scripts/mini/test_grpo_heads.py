"""Stage 3 of both heads: as much rollout for each, resumable, each with its own weights and tokenizer."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path

import pytest

from engine.cli.arguments_rl import rl_parser
from tests.conftest import ROOT
from tests.helpers.script_tree import ScriptTree
from util.config import parse_args

FAKE_PYTHON = """
case "$*" in
    main_rl.py*) mkdir -p "$folder"; case "$folder" in *"${FAIL_AT:-nowhere}") exit 7 ;; esac ;;
    *evaluate_layout*) mkdir -p "$folder"; touch "$folder/results.json" "$folder/generation.json" ;;
esac
"""
script_tree = partial(ScriptTree, script="grpo_heads.sh", root_variable="RL_ROOT", fake_python=FAKE_PYTHON)


def test_each_head_trains_on_its_own_codes_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = script_tree(tmp_path / "tree")
    code, lines = tree.run("--detector", "other.onnx", FAIL_AT="discrete", UPDATES="7")
    runs = [shlex.split(line) for line in lines if line.startswith("main_rl.py ")]
    assert code == 7 and len(runs) == 2 and not any("evaluate_layout" in line for line in lines)
    monkeypatch.chdir(ROOT)
    continuous, discrete = (parse_args(rl_parser(), words[1:]) for words in runs)
    assert (continuous.max_rl_steps, discrete.max_rl_steps) == (7, 21)
    assert continuous.lr == discrete.lr and continuous.batch_size * continuous.group_size == 32
    assert continuous.vae_path.endswith("kl8_mini.ckpt") and discrete.vae_path.endswith("vq4_mini.pt")
    assert continuous.cached_path != discrete.cached_path and continuous.resume != discrete.resume

    code, lines = tree.run("--detector", "other.onnx", UPDATES="7")
    assert code == 0 and sum(line.startswith("main_rl.py ") for line in lines) == 1
    assert sum("evaluate_layout" in line for line in lines) == 8
    assert sum("--rescore" in line for line in lines) == 4
    assert sum("scripts.compare" in line for line in lines) == 4
    code, lines = tree.run("--detector", "other.onnx", UPDATES="7")
    assert code == 0 and not any("evaluate_layout" in line or "main_rl" in line for line in lines)


def test_mistakes_are_refused_before_anything_runs(tmp_path: Path) -> None:
    tree = script_tree(tmp_path / "tree")
    for arguments in (("--fast",), ("--detector",)):
        code, lines = tree.run(*arguments)
        assert code == 2 and lines == []
