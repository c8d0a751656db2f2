"""The comparison of heads and trunks: one budget, resumable, nothing that does not belong together in one table."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from engine.cli.arguments import train_parser
from engine.cli.sizes import model_config
from engine.eval.targets import load_eval_set
from models.build import build_model
from scripts import evaluate_layout
from scripts.mini.families import families_table
from scripts.mini.families_table import LABELS
from tests.conftest import ROOT
from tests.helpers.eval_world import evaluate, tiny_profile, write_dataset
from tests.helpers.script_tree import ScriptTree
from util.config import parse_args

FAKE_PYTHON = """
case "$*" in
    main_mar.py*) mkdir -p "$folder"; case "$folder" in *"${FAIL_AT:-nowhere}") exit 7 ;; esac ;;
    *evaluate_layout*) mkdir -p "$folder"; touch "$folder/results.json" ;;
esac
"""
script_tree = partial(ScriptTree, script="families.sh", root_variable="FAMILIES_ROOT", fake_python=FAKE_PYTHON)


def trainings(lines: Sequence[str]) -> list[list[str]]:
    return [shlex.split(line) for line in lines if line.startswith("main_mar.py ")]


def evaluations(lines: Sequence[str]) -> list[list[str]]:
    return [shlex.split(line) for line in lines if line.startswith("-m scripts.evaluate_layout ")]


def test_all_models_have_the_same_budget_and_their_own_head_and_trunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, lines = script_tree(tmp_path / "tree").run("--detector", "other.onnx", STEPS="70", ITERATIONS="8 64")
    assert code == 0
    monkeypatch.chdir(ROOT)
    runs = [parse_args(train_parser(), words[1:]) for words in trainings(lines)]
    assert [Path(args.output_dir).name for args in runs] == list(LABELS)
    shared = ("coco_root", "batch_size", "epochs", "max_steps", "lr", "seed", "ema_rate", "train_mode", "resume")
    assert len({tuple(vars(args)[name] for name in shared) for args in runs}) == 1 and runs[0].max_steps == 70
    configs = {Path(args.output_dir).name: model_config(args, 12, 64) for args in runs}
    for name, config in configs.items():
        trunk, head = ("single", "discrete") if name == "maskgil" else name.split("_")
        assert (config.trunk, config.head, config.grid) == (trunk, head, (8, 8))
        assert config.encoder_depth + config.decoder_depth == 8
    counts = {name: sum(p.numel() for p in build_model(config).parameters()) for name, config in configs.items()}
    assert counts["maskgil"] == pytest.approx(counts["mae_diffusion"], rel=0.1)
    asked = [parse_args(evaluate_layout.get_parser(), words[2:]) for words in evaluations(lines)]
    assert len(asked) == len(LABELS) * 2 * 2 and {args.num_iter for args in asked} == {8, 64}
    assert lines[-1].endswith("--iterations 8 64 --detectors judge yolox --output " + lines[-1].split()[-1])


def test_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    tree = script_tree(tmp_path / "tree")
    code, lines = tree.run(FAIL_AT="mae_discrete")
    assert code == 7 and len(trainings(lines)) == 3 and evaluations(lines) == []
    code, lines = tree.run()
    assert code == 0 and len(trainings(lines)) == 3 and len(evaluations(lines)) == 5 * 4
    code, lines = tree.run()
    assert code == 0 and trainings(lines) == evaluations(lines) == []


def test_mistakes_are_refused_before_anything_runs(tmp_path: Path) -> None:
    tree = script_tree(tmp_path / "tree")
    for arguments, env in ((("--fast",), {}), (("--detector",), {}), ((), {"NAMES": "maskgil gan"})):
        code, lines = tree.run(*arguments, **env)
        assert code == 2 and lines == []


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("families")
    eval_set = load_eval_set(write_dataset(root / "coco"), tiny_profile())
    for shift, name in enumerate(("mae_diffusion", "maskgil")):
        for count in (8, 64):
            evaluate(root / name / str(count) / "judge", eval_set, f"{name}, {count}", 3 * shift)
            interval = {"value": 0.5, "low": 0.25, "high": 0.75}
            colour = {"format": "structmar-colour-1", "rows": [{"kind": "model", "accuracy_determined": interval}]}
            (root / name / str(count) / "colour.json").write_text(json.dumps(colour))
    seconds = {name: {"8": 0.25, "64": 2.0} for name in LABELS}
    told = {"num_images": 4, "repeats": 3, "precision": "fp32", "num_threads": 1, "seconds_an_image": seconds}
    (root / "times.json").write_text(json.dumps({"format": "structmar-mini-times-1", **told}))
    return root


def test_the_table_has_a_line_for_each_setting_and_each_bound(runs: Path) -> None:
    text = families_table(runs, ["mae_diffusion", "maskgil"], [8, 64], ["judge"])
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if "|" in line]
    heads = ["", "AP50, judge", "mIoU, judge", "extra/image, judge", "right colours", "seconds an image"]
    assert rows[0] == heads
    labels = [row[0] for row in rows[2:]]
    assert labels == ["real images", *(f"{LABELS[n]}, {c}" for n in ("mae_diffusion", "maskgil") for c in (8, 64))]
    by_label = {row[0]: row[1:] for row in rows[2:]}
    exact = by_label[f"{LABELS['mae_diffusion']}, 8"]
    assert exact[:3] == by_label["real images"][:3] and exact[3:] == ["50.0 [25.0, 75.0]", "0.250"]
    assert by_label[f"{LABELS['maskgil']}, 64"][1] != exact[1]


def test_evaluations_of_other_images_are_refused(runs: Path, tmp_path: Path) -> None:
    results = runs / "maskgil/64/judge/results.json"
    kept = results.read_text()
    changed = json.loads(kept)
    changed["dataset"]["ids_hash"] = "other"
    results.write_text(json.dumps(changed))
    try:
        with pytest.raises(ValueError, match="maskgil/64/judge"):
            families_table(runs, ["mae_diffusion", "maskgil"], [8, 64], ["judge"])
    finally:
        results.write_text(kept)
