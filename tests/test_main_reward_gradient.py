"""main_rl.py --objective reward_gradient as a user meets it: the run folder, kills, other ways, what mistakes say."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import main_mar
import main_rl
from engine.rl.picture_loss import PictureLoss
from engine.rl.reward_gradient import RewardGradientStep
from tests.helpers.coco_fixture import CATEGORIES
from tests.helpers.eval_world import write_detector, write_profile
from tests.helpers.processes import in_two_processes
from tests.helpers.runs import in_child, kill_in_call
from tests.helpers.tiny_run import argv, assert_same_run, load_checkpoint, read_metrics, write_world
from util.types import Category, LayoutBatch

NAMES = tuple(sorted((Category(each["id"], each["name"]) for each in CATEGORIES), key=lambda each: each.id))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """tests/helpers/tiny_run.py's world with a stage-2 checkpoint, three detectors and a profile."""
    root = write_world(tmp_path_factory.mktemp("gradient") / "world")
    for seed, name in enumerate(("detector", "judge", "second")):
        write_detector(root / f"{name}.pth", NAMES, seed)
    write_profile(root / "tiny.yaml", split="val2014")
    main_mar.main(argv(root, "sft", train_mode="full", max_steps=1, log_freq=1))
    return root


def gradient_argv(root: Path, output: str, **flags: Any) -> list[str]:
    """Flags of a short run in `root`; `flags` replace or add."""
    values = {
        "objective": "reward_gradient",
        "resume": root / "sft" / "checkpoint-last.pth",
        "detector_path": root / "detector.pth",
        "num_iter": 3,
        "num_sampling_steps": 6,
        "clip_x0": 3.0,
        "log_freq": 1,
        "warmup_epochs": None,
        "max_rl_steps": 2,
        "sample_freq": 0,
    } | flags
    return argv(root, output, **values)


def shown(world: Path) -> dict[str, Any]:
    """Pictures and held-out scores."""
    return {
        "max_rl_steps": 3, "sample_freq": 3, "num_preview": 1, "w_colour": 0.5, "augment_shift": 0.2, "eval_freq": 1,
        "eval_images": 2, "eval_detector": world / "judge.pth", "eval_profile": world / "tiny.yaml",
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(world) -> Path:
    assert main_rl.main(gradient_argv(world, "finished", **shown(world))) == 0
    return world / "finished"


# --- the run folder ------------------------------------------------------------------------------------------------


def test_the_run_folder(finished, world):
    lines = read_metrics(world, "finished")
    updates, rounds = [each for each in lines if "reward" in each], [each for each in lines if "eval/AP50" in each]
    assert [line["step"] for line in updates] == [1, 2, 3]
    assert [line["step"] for line in rounds] == [0, 1, 2, 3]  # the start is scored too
    losses = {f"detector/{name}" for name in ("classifier", "box_reg", "objectness", "rpn_box_reg")}
    assert set(updates[0]) >= losses | {"reward", "anchor", "loss", "colour", "grad_norm", "skipped", "lr"}
    assert updates[0]["anchor"] == pytest.approx(0, abs=1e-9) and updates[2]["anchor"] > 0
    log = (finished / "log.txt").read_text()
    assert "an update, per process: 2 images, no rollout; " in log and "detectors in 2 backbone passes" in log
    assert "2 more updates take" in log
    assert min(Image.open(finished / "predictions" / "step-0000003.png").size) > 32


def test_the_checkpoint_knows_its_objective_its_reward_and_its_start(finished, world):
    state, start = load_checkpoint(world, "finished"), load_checkpoint(world, "sft")
    assert state["stage"] == "reward_gradient" and len(state["reward_detector"]) == 64
    assert set(state["reference"]) == set(state["model_ema"])
    assert all(torch.equal(tensor, start["model_ema"][name]) for name, tensor in state["reference"].items())
    assert any(not torch.equal(tensor, state["model"][name]) for name, tensor in state["reference"].items())
    assert state["sampling"] == start["sampling"]
    with pytest.raises(SystemExit, match="was written by stage 'reward_gradient', this run is stage 'grpo'"):
        main_rl.main(gradient_argv(world, "finished", objective="grpo"))


def test_conditions_are_never_dropped(world, monkeypatch):
    """Whatever stage 2's rates are: every picture is held against boxes that the model was told of."""
    seen: list[bool] = []

    def look(loss: PictureLoss, images: Any, layout: LayoutBatch, real: Any, key: Any) -> Any:
        seen.append(bool(layout.valid.any(1).all()))
        return images.mean(), {}

    monkeypatch.setattr(PictureLoss, "__call__", look)
    main_rl.main(gradient_argv(world, "whole", label_drop_prob=1.0, max_rl_steps=1))
    assert seen == [True]


@pytest.mark.parametrize(
    "flags",
    [
        {"gradient_states": "rollout", "gradient_steps": 2, "cfg": 2.0},
        {"anchor": 0, "rl_train": "backbone", "accum_iter": 2},
        {"precision": "bf16", "rl_train": "adapters", "mask_schedule": "cosine"},
        {"detector_weights": (1, 0.5), "augment_blur": 1.0, "augment_noise": 0.1, "augment_resize": 0.2},
    ],
    ids=lambda flags: "-".join(flags),
)
def test_the_other_ways(world, flags, caplog):
    output, weights = "-".join(flags), flags.pop("detector_weights", ()) if "detector_weights" in flags else ()
    ensemble = ["--more_detectors", str(world / "second.pth"), "--detector_weights", *map(str, weights)]
    with caplog.at_level(logging.WARNING):
        assert main_rl.main([*gradient_argv(world, output, **flags), *(ensemble if weights else [])]) == 0
    assert ("teaches the prediction without guidance" in caplog.text) == ("cfg" in flags)
    assert [line["skipped"] for line in read_metrics(world, output)] == [0.0, 0.0]
    assert load_checkpoint(world, output)["reward_detector"].count("+") == bool(weights)


# --- killing, processes --------------------------------------------------------------------------------------------


def test_killed_and_continued_is_uninterrupted(world, finished):
    """By SIGKILL in the middle of the third update."""

    def run() -> int:
        kill_in_call(RewardGradientStep, "backward", 2)
        return main_rl.main(gradient_argv(world, "killed", save_freq_steps=1, **shown(world)))

    assert in_child(run) == -signal.SIGKILL
    assert load_checkpoint(world, "killed")["step"] == 2
    main_rl.main(gradient_argv(world, "killed", **shown(world)))
    assert_same_run(world, "killed", "finished")


@pytest.mark.integration
def test_two_processes_sharded(world):
    """A copy for each process, or shards: the same weights, with pictures and rollouts on the way."""
    flags = {"gradient_states": "rollout", "gradient_steps": 2, "sample_freq": 1, "max_rl_steps": 1}
    for output, fsdp in (("sharded", True), ("replicated", None)):
        run = gradient_argv(world, output, fsdp=fsdp, **flags)
        in_two_processes(lambda _, run=run: main_rl.main(run), join_group=False)
        assert (world / output / "predictions" / "step-0000001.png").is_file()
    one, other = load_checkpoint(world, "sharded")["model"], load_checkpoint(world, "replicated")["model"]
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], atol=2e-5) for name in one)


# --- mistakes ------------------------------------------------------------------------------------------------------


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"reward_t_min": 900}, "--reward_t_min 900 is above --reward_t_max 850"),
    ({"reward_t_max": 1000}, "--reward_t_max must be at most 999, got 1000"),
    ({"kl_coef": 0.1}, "--kl_coef 0.1 does not go with --objective reward_gradient"),
    ({"group_size": 8}, "--group_size 8 does not go with --objective reward_gradient"),
    ({"rl_estimator": "elbo"}, "--rl_estimator elbo does not go with --objective reward_gradient"),
    ({"objective": "grpo", "w_colour": 2.0}, "--w_colour 2.0 does not go with --objective grpo"),
    ({"objective": "nft", "anchor": 0.1}, "--anchor 0.1 does not go with --objective nft"),
    ({"more_detectors": "nowhere.pth"}, "--more_detectors nowhere.pth does not exist"),
    (
        {"head": "discrete", "codebook_size": 8, "vae_embed_dim": 1, "clip_x0": None, "num_sampling_steps": None},
        "--objective reward_gradient needs a diffusion head",
    ),
]


def refused(world: Path, **flags: Any) -> str:
    """What a run says that is refused; its output folder must not exist."""
    with pytest.raises(SystemExit) as caught:
        main_rl.main(gradient_argv(world, "refused", **flags))
    assert not (world / "refused").exists()
    message = str(caught.value)
    assert message.startswith("main_rl.py: error: ") and "\n" not in message
    return message


@pytest.mark.parametrize(("flags", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes_stop_it_before_it_writes(world, flags, message):
    assert message in refused(world, **flags)


def test_detectors_that_do_not_fit(world, tmp_path):
    few = write_detector(tmp_path / "few.pth", [Category(1, "tomato")])
    assert f"--more_detectors {few}: the detector (fasterrcnn_mini) cannot reward leaf" in refused(
        world, more_detectors=few
    )
    same = world / "detector.pth"
    assert f"--more_detectors {same} is the same detector as --detector_path {same}" in refused(
        world, more_detectors=same
    )
    flags = {"more_detectors": same, "detector_weights": 2.0}
    assert "--detector_weights 2 must be one for each of the 2 detectors" in refused(world, **flags)
    judge = {"eval_detector": world / "judge.pth", "eval_profile": world / "tiny.yaml"}
    assert "is the detector that rewards" in refused(world, more_detectors=world / "judge.pth", **judge)


def test_the_reward_and_the_start_of_a_run_stay(world):
    run = gradient_argv(world, "no_anchor", anchor=0, max_rl_steps=1)
    main_rl.main(run)
    with pytest.raises(SystemExit, match=r"has no reference, it was written without; --anchor 0\.3 needs it"):
        main_rl.main(gradient_argv(world, "no_anchor"))
    with pytest.raises(SystemExit, match="was rewarded by the detector"):
        main_rl.main(gradient_argv(world, "no_anchor", anchor=0, detector_path=world / "judge.pth"))
