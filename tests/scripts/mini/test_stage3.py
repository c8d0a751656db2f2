"""Stage 3 as one command: a run begins where another ended and goes on where it stopped, and all are judged alike."""

from __future__ import annotations

import json
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from engine.cli.arguments import train_parser
from engine.cli.arguments_rl import rl_parser
from scripts.mini import stage3_table, stage3_tables
from tests.conftest import ROOT
from tests.helpers.script_tree import ScriptTree
from tests.scripts.mini.test_rl_comparison import BOXES, write_evaluation
from util.config import parse_args

FAKE_PYTHON = """
case "$*" in
    main_*) mkdir -p "$folder"; case "$folder" in *"${FAIL_AT:-nowhere}"/1) exit 7 ;; esac ;;
    *export_weights*) touch "$file" ;;
    *evaluate_layout*) mkdir -p "$folder"; touch "$folder/results.json" "$folder/generation.json" ;;
    *colour_accuracy*) touch "$file" ;;
esac
"""
RUNS = ["distill", "reward_gradient", "few_step", "grpo", "nft", "best_of"]
STAGE_2 = "pretrained_models/mini/structmar_mini_stage2.safetensors"

script_tree = partial(ScriptTree, script="stage3.sh", root_variable="RL_ROOT", fake_python=FAKE_PYTHON)


def calls(lines: list[str], start: str) -> list[list[str]]:
    return [shlex.split(line) for line in lines if line.startswith(start)]


def value_of(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_every_run_begins_with_the_weights_that_its_own_training_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    tree = script_tree(tmp_path / "tree")
    code, lines = tree.run(TRAININGS="0 5")
    assert code == 0
    runs, exports = calls(lines, "main_"), calls(lines, "-m scripts.export_weights ")
    out = tree.root / "output/mini/stage3_runs/runs"
    places = [Path(value_of(words, "--output_dir")).relative_to(out) for words in runs]
    assert [str(place) for place in places] == [f"{name}/{training}" for training in (0, 5) for name in RUNS]
    starts = {"distill": None, "few_step": "reward_gradient"}
    for place, words in zip(places, runs, strict=True):
        name, training = place.parts
        begun = starts.get(name, "distill")
        wanted = STAGE_2 if begun is None else str(out / begun / training / "weights.safetensors")
        assert (value_of(words, "--resume"), value_of(words, "--seed")) == (wanted, training)
        args = parse_args(rl_parser() if words[0] == "main_rl.py" else train_parser(), words[1:])
        assert name in (args.objective if words[0] == "main_rl.py" else args.train_mode)
    written = [value_of(words, "--output") for words in exports]
    assert written == [str(out / place / "weights.safetensors") for place in places]


def test_every_detector_judges_the_same_pictures(tmp_path: Path) -> None:
    tree = script_tree(tmp_path / "tree")
    code, lines = tree.run("--detector", "other.onnx", NAMES="distill reward_gradient few_step", TRAININGS="0")
    assert code == 0
    found = calls(lines, "-m scripts.evaluate_layout ")
    scores = tree.root / "output/mini/stage3_runs/scores"
    places = [Path(value_of(words, "--output_dir")).relative_to(scores).parts for words in found]
    rows = ("stage2", "stage2_cool", "distill", "reward_gradient", "few_step_1", "few_step_2", "few_step_4")
    detectors = ("judge", "reward", "yolox")
    assert places == [(row, "0", detector) for row in rows for detector in detectors]
    for (row, training, detector), words in zip(places, found, strict=True):
        assert ("--rescore" in words) == (detector != "judge")  # generated once
        assert (scores / row / training / detector / "images").is_symlink() == (detector != "judge")
        evaluations = value_of(words, "--head_evals") if "--head_evals" in words else None
        assert evaluations == (row[-1] if row.startswith("few_step") else None)
        assert not {"--cfg", "--cfg_text", "--num_iter"} & set(words)  # what the weights say
        assert ("--temperature" in words) == (row == "stage2_cool")
    (table,) = calls(lines, "-m scripts.mini.stage3_table ")
    args = vars(stage3_table.parse_args(table[2:]))
    assert tuple(args["rows"]) == rows and tuple(args["detectors"]) == detectors


def test_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    tree = script_tree(tmp_path / "tree")
    code, lines = tree.run(FAIL_AT="grpo")
    assert code == 7 and len(calls(lines, "main_")) == 6 + 4
    code, lines = tree.run()
    assert code == 0 and len(calls(lines, "main_")) == 3
    assert len(calls(lines, "-m scripts.evaluate_layout ")) == 2 * (2 + 2 * 8)
    code, lines = tree.run()
    assert code == 0 and not calls(lines, "main_") and not calls(lines, "-m scripts.evaluate_layout ")


def test_smoke_is_apart_and_small(tmp_path: Path) -> None:
    code, lines = script_tree(tmp_path / "tree").run("--smoke")
    runs = calls(lines, "main_")
    assert code == 0 and all("_smoke/" in value_of(words, "--output_dir") for words in runs)
    assert {value_of(words, "--max_rl_steps" if words[0] == "main_rl.py" else "--max_steps") for words in runs} == {"2"}


def test_mistakes_are_refused_before_anything_runs(tmp_path: Path) -> None:
    tree = script_tree(tmp_path / "tree")
    for arguments, env in ((("--fast",), {}), (("--detector",), {}), ((), {"NAMES": "distill ppo"})):
        code, lines = tree.run(*arguments, **env)
        assert code == 2 and lines == []


# --- tables ----------------------------------------------------------------------------------------------------------


def write_scores(root: Path, row: str, training: str, found: set[int], right: list[int], **changes: Any) -> None:
    """Both images have two coloured objects, of which so many are right; pictures are grey."""
    folder = root / "scores" / row / training
    for detector in ("judge", "reward"):
        sampling = {"num_iter": 4, "num_sampling_steps": 5}
        own = {"weights": row + training, "sampling": sampling, **changes}
        write_evaluation(folder / detector, found, **own)
    counts = {"right": right, "wanted": [2, 2]}
    rows = [{"kind": "model", "determined_by_image": counts}]
    (folder / "colour.json").write_text(json.dumps({"format": "structmar-colour-1", "rows": rows}))
    pictures = folder / "judge/images/seed_0"
    pictures.mkdir(parents=True)
    for image_id in BOXES:
        cv2.imwrite(str(pictures / f"{image_id:012d}.png"), np.full((64, 64, 3), 128, dtype=np.uint8))


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stage 2 misses the second image in seed 0. Of two trainings of GRPO, one draws everything, one does not."""
    monkeypatch.setattr(stage3_tables, "weights_of", lambda *_: ROOT / STAGE_2)
    write_scores(tmp_path, "stage2", "0", {1}, right=[1, 1])
    write_scores(tmp_path, "grpo", "0", {1, 2}, right=[2, 2])
    write_scores(tmp_path, "grpo", "1", {1}, right=[1, 1])
    (tmp_path / "runs/grpo/0").mkdir(parents=True)
    (tmp_path / "runs/grpo/0/metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "reward": 0.6}\n')
    return tmp_path


def cells_of(text: str, label: str) -> list[list[str]]:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [row[1:] for row in rows if row[0] == label]


def test_tables_by_hand(runs: Path) -> None:
    """mIoU of stage 2: 3 of 4; GRPO's trainings 4 of 4 and 3 of 4. Colours: 2 of 4; 4 of 4 and 2 of 4."""
    text = stage3_tables.tables(runs, ["stage2", "grpo"], ["judge", "reward"], Path("-"), num_resamples=50)
    heads = ["AP50", "mIoU", "success", "extra / image", "right colours", "AP50, reward detector"]
    assert cells_of(text, "") == [[*heads, "GFLOP / image"]]
    (values, gains), (before,) = cells_of(text, "GRPO"), cells_of(text, "stage 2, guided")
    assert before[1].startswith("75.0 [") and values[1].startswith("87.5 [") and gains[1].startswith("+12.5 [+0.0, ")
    assert before[4] == "50.0 [50.0, 50.0]" and values[4] == "75.0 [75.0, 75.0]"
    assert gains[4] == "+25.0 [+25.0, +25.0]"
    assert [cells_of(text, f"GRPO, {training}")[0][1] for training in (0, 1)] == ["100.0", "75.0"]
    assert float(before[-1]) > 0 and "mini (abc), 2 images of val2017 (ids def), seeds 0, 1" in text


@pytest.mark.parametrize("changes", [{"seeds": [0, 2]}, {"detector": {"id": "x"}}, {"profile": {"name": "y"}}])
def test_rows_that_do_not_belong_together_are_refused(runs: Path, changes: dict[str, Any]) -> None:
    write_scores(runs, "nft", "0", {1}, right=[1, 1], **changes)
    with pytest.raises(ValueError, match=f"{next(iter(changes))} differs: .*stage2.*nft"):
        stage3_tables.tables(runs, ["stage2", "nft"], ["judge"], Path("-"), num_resamples=5)


def test_the_script_of_the_table(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {flag: runs / name for flag, name in (("output", "t.md"), ("curves", "c.png"), ("gallery", "g.png"))}
    given = ["--runs", str(runs), "--stage2", STAGE_2, "--num_shown", "2"]
    given += [word for flag, path in files.items() for word in (f"--{flag}", str(path))]
    stage3_table.main([*given, "--rows", "stage2", "grpo"])
    assert files["output"].read_text() == capsys.readouterr().out and files["curves"].is_file()
    height, width, _ = cv2.imread(str(files["gallery"])).shape
    assert width > 2 * stage3_tables.CELL and height > 2 * stage3_tables.CELL
    with pytest.raises(SystemExit, match=r"error: .*scores/nft has no training"):
        stage3_table.main([*given, "--rows", "stage2", "nft"])
