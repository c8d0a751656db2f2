"""The comparison of reward fine-tunings: one budget, resumable; numbers by hand; gains are paired."""

from __future__ import annotations

import json
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.checkpoint.files import read_identity
from engine.cli.arguments_rl import rl_parser
from engine.cli.build_rl import build_estimator
from engine.cli.sampling import sampling_config
from engine.eval.compare import Measured
from models.policy.trajectory import TrajectoryEstimator
from scripts import evaluate_layout
from scripts.mini import rl_curves, rl_table, rl_tables
from scripts.mini.rl_measures import load_evaluation, measure
from tests.conftest import ROOT
from tests.helpers.script_tree import ScriptTree
from util.config import load_yaml, parse_args

# script

FAKE_PYTHON = """
case "$*" in
    *mini_stage3.yaml*) mkdir -p "$folder"; case "$folder" in *"${FAIL_AT:-nowhere}") exit 7 ;; esac ;;
    *evaluate_layout*) mkdir -p "$folder"; touch "$folder/results.json" "$folder/generation.json" ;;
    *colour_accuracy*) touch "$file" ;;
esac
"""
RUNS = ["elbo", "trajectory", "no_kl", "paper", "guided"]

script_tree = partial(ScriptTree, script="rl_comparison.sh", root_variable="RL_ROOT", fake_python=FAKE_PYTHON)


def trainings(lines: list[str]) -> list[list[str]]:
    return [shlex.split(line) for line in lines if "mini_stage3.yaml" in line]


def evaluations(lines: list[str]) -> list[list[str]]:
    return [shlex.split(line) for line in lines if line.startswith("-m scripts.evaluate_layout ")]


def value_of(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_every_run_has_the_same_budget_and_start(tmp_path: Path) -> None:
    code, lines = script_tree(tmp_path / "tree").run(UPDATES="7")
    assert code == 0
    found = trainings(lines)
    assert [Path(value_of(words, "--output_dir")).name for words in found] == RUNS
    mains = [["main_rl.py", "--config"]] * 3 + [["-m", "scripts.mini.paper_surrogate"], ["main_rl.py", "--config"]]
    assert [words[:2] for words in found] == mains
    no_kl = ["--kl_coef", "0"]
    own = {
        "elbo": [],
        "trajectory": ["--rl_masks", "4", "--rl_draws", "8", "--lr", "1e-5"],
        "no_kl": no_kl,
        "paper": no_kl,
        "guided": ["--cfg_text", "6", "--cfg_layout", "4", "--cfg_schedule", "constant", "--lr", "1e-5"],
    }
    for name, words in zip(RUNS, found, strict=True):
        estimator = "trajectory" if name == "trajectory" else "elbo"
        assert words[words.index("--rl_estimator") :] == ["--rl_estimator", estimator, *own[name]]
        assert value_of(words, "--max_rl_steps") == "7"
        assert value_of(words, "--resume") == "pretrained_models/mini/structmar_mini_stage2.safetensors"
        shared = words[words.index("--coco_root") : words.index("--rl_estimator")]
        assert shared == found[0][found[0].index("--coco_root") : found[0].index("--rl_estimator")]


def test_every_detector_judges_the_same_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = script_tree(tmp_path / "tree")
    code, lines = tree.run("--detector", "other.onnx", NAMES="elbo", SEEDS="3 4")
    assert code == 0
    monkeypatch.chdir(ROOT)
    found = [vars(parse_args(evaluate_layout.get_parser(), words[2:])) for words in evaluations(lines)]
    out = tree.root / "output/mini/rl_200_updates"
    places = [Path(values["output_dir"]).relative_to(out).parts for values in found]
    detectors = ("reward", "judge", "yolox")
    assert places == [(n, s, d) for n in ("stage2", "elbo") for s in ("rollout", "guided") for d in detectors]
    for (name, sampling, detector), values in zip(places, found, strict=True):
        assert values["rescore"] == (detector != "reward")  # generated once
        assert (out / name / sampling / detector / "images").is_symlink() == (detector != "reward")
        assert values["real_bound"] == (name == "stage2")
        assert values["seeds"] == [3, 4] and values["max_images"] == 300
        said = (1.0, 16) if sampling == "rollout" else (None, 64)  # the parser's: left to what the weights say
        assert (values["cfg_text"], values["num_iter"]) == said
    assert {values["detector"] for values in found} == {
        "pretrained_models/mini/fasterrcnn_mini.pth", "pretrained_models/mini/fasterrcnn_mini_judge.pth", "other.onnx",
    }  # fmt: skip
    assert found[0]["resume"].endswith("stage2.safetensors") and found[-1]["resume"].endswith("checkpoint-last.pth")
    assert lines[-1].startswith(
        f"-m scripts.mini.rl_table --runs {out} --names stage2 elbo --detectors reward judge yo"
    )


def test_rollouts_are_drawn_as_the_config_says(tmp_path: Path) -> None:
    """What the script passes is what configs/mini_stage3.yaml has: so a run without the script is the same run."""
    (words,) = trainings(script_tree(tmp_path / "tree").run(NAMES="elbo")[1])
    config = load_yaml(ROOT / "configs/mini_stage3.yaml")
    for name in ("num_iter", "num_sampling_steps", "temperature"):
        assert float(value_of(words, f"--{name}")) == config[name]
    assert float(value_of(words, "--cfg_text")) == float(value_of(words, "--cfg_layout")) == config["cfg"] == 1
    assert config["detector_path"] != config["eval_detector"]
    assert int(value_of(words, "--max_rl_steps")) == config["max_rl_steps"]
    (words,) = trainings(script_tree(tmp_path / "guided").run(NAMES="guided")[1])
    args, started_from = parse_args(rl_parser(), words[1:]), read_identity(ROOT / str(config["resume"]))
    assert started_from is not None
    for name in ("cfg_text", "cfg_layout", "cfg_schedule"):  # mini_eval.yaml leaves them to the weights
        assert getattr(args, name) == getattr(started_from.sampling, name)


def test_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    tree = script_tree(tmp_path / "tree")
    code, lines = tree.run(FAIL_AT="no_kl")
    assert code == 7 and len(trainings(lines)) == 3 and evaluations(lines) == []
    code, lines = tree.run()
    assert code == 0 and [Path(value_of(words, "--output_dir")).name for words in trainings(lines)] == RUNS[2:]
    assert len(evaluations(lines)) == 6 * 2 * 2
    code, lines = tree.run()
    assert code == 0 and trainings(lines) == evaluations(lines) == []
    code, lines = tree.run(UPDATES="20")  # another budget, other folders
    assert code == 0 and len(trainings(lines)) == 5


def test_smoke_is_apart_and_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    code, lines = script_tree(tmp_path / "tree").run("--smoke")
    assert code == 0 and all(value_of(words, "--max_rl_steps") == "2" for words in trainings(lines))
    args = parse_args(rl_parser(), trainings(lines)[1][1:])
    estimator = build_estimator(args, sampling_config(args))  # scores no more steps than there are
    assert isinstance(estimator, TrajectoryEstimator) and estimator.num_draws is not None
    assert estimator.num_draws <= args.num_sampling_steps - 4
    assert all("_smoke/" in value_of(words, "--output_dir") for words in trainings(lines) + evaluations(lines))


def test_mistakes_are_refused_before_anything_runs(tmp_path: Path) -> None:
    tree = script_tree(tmp_path / "tree")
    for arguments, env in ((("--fast",), {}), (("--detector",), {}), ((), {"NAMES": "elbo ppo"})):
        code, lines = tree.run(*arguments, **env)
        assert code == 2 and lines == []


# numbers

BALL, KITE = 37, 38
BOXES = {1: [8.0, 8.0, 16.0, 16.0], 2: [20.0, 20.0, 20.0, 20.0]}


def ground_truth() -> dict[str, Any]:
    return {
        "images": [{"id": each, "width": 64, "height": 64} for each in BOXES],
        "annotations": [
            {"id": each, "image_id": each, "category_id": BALL, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for each, box in BOXES.items()
        ],
        "categories": [{"id": BALL, "name": "sports ball"}, {"id": KITE, "name": "kite"}],
    }


def detection(image_id: int, score: float = 1.0, **changes: Any) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": BALL, "bbox": BOXES[image_id], "score": score, **changes}


def line(row: str, seed: int | None, image_id: int, iou: float, extra: int) -> dict[str, Any]:
    shares = {"mIoU": iou, "SR50": float(iou >= 0.5)}
    return {"row": row, "seed": seed, "image_id": image_id, **shares, "extra": extra, "wanted": [{}]}


def write_evaluation(folder: Path, found: set[int], weights: str = "w", **changes: Any) -> Path:
    """A model that draws the objects of the images `found` perfectly in seed 0 and all of them in seed 1."""
    name = folder.parts[-3]
    (folder / "detections").mkdir(parents=True)
    seeds = {0: sorted(found), 1: [1, 2]}
    lines = []
    for seed, ids in seeds.items():
        entries = [detection(each) for each in ids]
        (folder / "detections" / f"{name}_seed_{seed}.json").write_text(json.dumps(entries))
        lines += [line(name, seed, each, float(each in ids), int(each not in ids)) for each in BOXES]
    profile = {"name": "mini", "hash": "abc", "settings": {"max_detections": 100, "area_edges_px": [10, 20]}}
    results = {
        "format": "structmar-eval-1",
        "profile": profile,
        "dataset": {"split": "val2017", "num_images": 2, "ids_hash": "def"},
        "detector": {"id": folder.name},
        "source": {"weights_sha256": weights},
        "sampling": {"num_iter": 16},
        "seeds": [0, 1],
        "rows": [{"name": name, "kind": "model"}],
        **changes,
    }
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "ground_truth_conditioned.json").write_text(json.dumps(ground_truth()))
    (folder / "per_image.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return folder


def write_runs(root: Path, **changes: Any) -> Path:
    """Stage 2 misses the second image in seed 0; elbo draws everything. `changes` go to elbo's judge."""
    for name, found in (("stage2", {1}), ("elbo", {1, 2})):
        for sampling in rl_tables.SAMPLINGS:
            for detector in ("reward", "judge"):
                own = changes if (name, detector) == ("elbo", "judge") else {}
                write_evaluation(root / name / sampling / detector, found, **({"weights": name} | own))
            row = {"kind": "model", "accuracy_determined": {"value": 0.5, "low": 0.4, "high": 0.6}}
            colour = {"format": "structmar-colour-1", "rows": [row]}
            (root / name / sampling / "colour.json").write_text(json.dumps(colour))
    (root / "elbo" / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "reward": 0.6}\n')
    return root


def test_measures_by_hand(tmp_path: Path) -> None:
    """A perfect box earns 1 + .2 + .2, a missed one -.1. Seed 0 finds one of two objects, seed 1 both."""
    evaluation = load_evaluation(write_evaluation(tmp_path / "model" / "rollout" / "reward", {1}), num_resamples=50)
    found = measure(evaluation, "model")
    assert found["reward"].value == pytest.approx((1.4 + 1.4 + 1.4 - 0.1) / 4)
    assert found["AP50"].value == pytest.approx((51 / 101 + 1) / 2)  # recall reaches .5: 51 of COCO's 101 points
    assert found["mIoU"].value == pytest.approx(3 / 4)
    assert found["SR50"].value == pytest.approx(3 / 4) and found["extra"].value == pytest.approx(1 / 4)
    drawn_first = evaluation.weights[:, 0] / 2  # share of the first image in each resample
    assert found["mIoU"].samples == pytest.approx(drawn_first + 0.5 * (1 - drawn_first))
    assert found["reward"].samples == pytest.approx(1.4 * drawn_first + 0.65 * (1 - drawn_first))
    with pytest.raises(ValueError, match="expected one row 'VAE round trip', found 0"):
        measure(evaluation, "VAE round trip")


def test_gains_are_paired() -> None:
    """Two numbers that move together: each has a wide interval, their difference none."""
    samples = np.linspace(0, 1, 101)
    before, after = Measured(0.5, samples), Measured(0.6, samples + 0.1)
    gain = after.minus(before)
    assert (gain.value, gain.low, gain.high) == (pytest.approx(0.1), pytest.approx(0.1), pytest.approx(0.1))
    assert after.interval.high - after.interval.low == pytest.approx(0.95)
    with pytest.raises(ValueError, match=r"\(101,\) and \(3,\)"):
        before.minus(Measured(0.0, np.zeros(3)))


def test_table_by_hand(tmp_path: Path) -> None:
    text = rl_tables.comparison(write_runs(tmp_path), ["stage2", "elbo"], ["reward", "judge"], num_resamples=50)
    lines = [entry for entry in text.splitlines() if entry.startswith("| ")]
    heads = ["reward detector"] * 3 + ["judge"] * 5
    measures = ["mean reward", "AP50", "mIoU", "mean reward", "AP50", "mIoU", "success rate", "extra objects an image"]
    names = [f"| {measure}, {head}" for measure, head in zip(measures, heads, strict=True)]
    assert [entry.split(" | ")[0] for entry in lines] == 2 * ["|", *names, "| right colours"]
    assert lines[0] == "| | stage 2 (before) | GRPO, elbo |"
    cells = {entry.split(" | ")[0]: entry.removesuffix(" |").split(" | ")[1:] for entry in lines[1:10]}
    before, after = cells["| mean reward, reward detector"]
    assert before.startswith("1.025 [0.6") and after == "1.400 [1.400, 1.400], +0.375 [+0.000, +0.750]"
    assert cells["| mIoU, reward detector"][1] == "100.0 [100.0, 100.0], +25.0 [+0.0, +50.0]"
    assert cells["| success rate, judge"][0] == "75.0 [50.0, 100.0]"
    assert cells["| extra objects an image, judge"][1] == "0.00 [0.00, 0.00], -0.25 [-0.50, +0.00]"
    assert cells["| right colours"] == ["50.0 [40.0, 60.0]"] * 2
    assert "mini (abc), 2 images of val2017 (ids def), seeds 0, 1" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [0, 2]}, r"seeds differs: \[0, 1\] in .*stage2.*, \[0, 2\] in .*elbo/rollout/judge"),
        ({"detector": {"id": "x"}}, "detector id differs: judge in .*, x in "),
        ({"weights": "v"}, "weights_sha256 differs: elbo in .*reward, v in .*judge"),
        ({"format": "x"}, r"elbo/rollout/judge/results.json has format 'x'"),
    ],
)
def test_rows_that_do_not_belong_together_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rl_tables.comparison(write_runs(tmp_path, **changes), ["stage2", "elbo"], ["reward", "judge"])


def test_the_script_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_runs(tmp_path)
    common = ["--runs", str(tmp_path), "--output", str(tmp_path / "table.md"), "--curves", str(tmp_path / "curves.png")]
    rl_table.main([*common, "--names", "stage2", "elbo"])
    assert (tmp_path / "table.md").read_text() == capsys.readouterr().out and (tmp_path / "curves.png").is_file()
    with pytest.raises(SystemExit, match=r"error: .*trajectory/metrics.jsonl does not exist"):
        rl_table.main([*common, "--names", "stage2", "elbo", "trajectory"])
    curves = ["--output", str(tmp_path / "two.png"), "--runs", str(tmp_path / "elbo")]
    rl_curves.main(curves)
    assert capsys.readouterr().out == f"{tmp_path / 'two.png'}\n" and (tmp_path / "two.png").is_file()
    with pytest.raises(SystemExit, match=r"error: .*ppo/metrics.jsonl does not exist"):
        rl_curves.main([*curves, str(tmp_path / "ppo")])
