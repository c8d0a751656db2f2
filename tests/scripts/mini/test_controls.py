"""The table of controls: every control of the script for both models, resumable, nothing that does not belong
together in one table."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest

from engine.cli.sampling import sampling_config
from engine.eval.targets import load_eval_set
from models.sampling.config import SamplingConfig
from scripts import evaluate_layout
from scripts.mini import controls_table
from scripts.mini.controls import controls_table as table_of
from scripts.mini.controls import flags_of
from tests.conftest import ROOT
from tests.helpers.eval_world import evaluate, tiny_profile, write_dataset
from tests.helpers.script_tree import ScriptTree
from util.config import parse_args

FAKE_PYTHON = """
case "$*" in
    *evaluate_layout*)
        mkdir -p "$folder"
        case "$folder" in *"${FAIL_AT:-nowhere}") exit 7 ;; esac
        touch "$folder/results.json" ;;
    *colour_accuracy*) touch "$file" ;;
esac
"""
script_tree = partial(ScriptTree, script="controls.sh", root_variable="CONTROLS_ROOT", fake_python=FAKE_PYTHON)
NUM_CONTROLS = 8
FADING = SamplingConfig(layout_schedule=(0.3, 0.2))


def evaluations(lines: Sequence[str]) -> list[str]:
    return [line for line in lines if line.startswith("-m scripts.evaluate_layout ")]


def test_every_control_of_both_models_is_one_that_the_table_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flags that the script gives parse, steer something but for the plain ones, and all differ."""
    code, lines = script_tree(tmp_path / "tree").run(IMAGES="40")
    assert code == 0 and len(evaluations(lines)) == 2 * NUM_CONTROLS
    monkeypatch.chdir(ROOT)
    told: dict[str, list[str]] = {}
    for line in evaluations(lines):
        spoken = line.replace("--negative_prompt on the grass", "--negative_prompt 'on the grass'")  # one word in bash
        args = parse_args(evaluate_layout.get_parser(), shlex.split(spoken)[2:])
        args.cfg_text = 6.0  # as the weights say
        told.setdefault(Path(args.resume).name, []).append(flags_of(sampling_config(args)))
        assert args.max_images == 40 and args.detector.endswith("fasterrcnn_mini_judge.pth")
    first, second = told.values()
    assert first == second and first[0] == "none" and len(set(first)) == NUM_CONTROLS
    words = shlex.split(lines[-1])
    assert controls_table.parse_args(words[2:]).controls[0] == "plain"


def test_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    tree = script_tree(tmp_path / "tree")
    code, lines = tree.run(FAIL_AT="stage2/half")
    assert code == 7 and len(evaluations(lines)) == 4
    code, lines = tree.run()
    assert code == 0 and len(evaluations(lines)) == 2 * NUM_CONTROLS - 3
    code, lines = tree.run()
    assert code == 0 and evaluations(lines) == [] and "controls_table" in lines[-1]


def test_mistakes_are_refused_before_anything_runs(tmp_path: Path) -> None:
    tree = script_tree(tmp_path / "tree")
    for arguments, env in ((("--fast",), {}), ((), {"NAMES": "plain wild"})):
        code, lines = tree.run(*arguments, **env)
        assert code == 2 and lines == []


def test_flags_are_as_a_command_line_gives_them() -> None:
    config = replace(FADING, negative_prompt="on the grass", cfg_text=2.0, mask_threshold=0.5, start_step=3)
    steered = replace(config, drop_grounding_tokens=True)
    expected = (
        '`--layout_schedule 0.3 0.2 --drop_grounding_tokens --mask_threshold 0.5 --start_step 3 --negative_prompt "on '
        'the grass"`'
    )
    assert flags_of(steered) == expected and flags_of(SamplingConfig()) == "none"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Evaluations of photographs: as they are, and moved by six pixels."""
    root = tmp_path_factory.mktemp("controls")
    eval_set = load_eval_set(write_dataset(root / "coco"), tiny_profile())
    for shift, (name, config) in enumerate((("plain", SamplingConfig()), ("fading", FADING))):
        folder = evaluate(root / "model" / name, eval_set, name, 6 * shift)
        results = json.loads((folder / "results.json").read_text())
        (folder / "results.json").write_text(json.dumps(results | {"sampling": asdict(config)}))
        interval = {"value": 0.5, "low": 0.25, "high": 0.75}
        colour = {"format": "structmar-colour-1", "rows": [{"kind": "model", "accuracy_determined": interval}]}
        (folder / "colour.json").write_text(json.dumps(colour))
    told = {"num_images": 4, "repeats": 3, "precision": "fp32", "num_threads": 1}
    seconds = {"seconds_an_image": {"model": {"plain": 0.5, "fading": 0.75}}}
    (root / "times.json").write_text(json.dumps({"format": "structmar-mini-control-times-1", **told, **seconds}))
    return root


def test_the_table_says_what_each_control_changes(runs: Path) -> None:
    text = table_of(runs, ["model"], ["plain", "fading"])
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if "|" in line]
    assert rows[0][1:] == ["classes found", "AP50", "mIoU", "mIoU against the first", "right colours",
                           "seconds an image", "times the first"]  # fmt: skip
    by_flags = {row[0].strip("| "): row[1:] for row in rows[2:]}
    assert list(by_flags) == ["real drawings", "none", "`--layout_schedule 0.3 0.2`"]
    plain, fading = by_flags["none"], by_flags["`--layout_schedule 0.3 0.2`"]
    assert plain[:3] == by_flags["real drawings"][:3] and plain[3] == "" and plain[-2:] == ["0.500", "1.00"]
    assert float(fading[0].split()[0]) > 80  # of classes, wherever they are
    assert fading[3].startswith("-") and fading[4:] == ["50.0 [25.0, 75.0]", "0.750", "1.50"]
    with pytest.raises(FileNotFoundError, match="half"):
        table_of(runs, ["model"], ["plain", "half"])
