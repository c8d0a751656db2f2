"""main_rl.py as a user meets it: the paper's command, the run folder, stops and kills, and what mistakes say."""

from __future__ import annotations

import json
import logging
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import engine.rl.step
import main_rl
from engine.cli.arguments_rl import rl_parser
from engine.cli.sizes import model_config, rl_estimator
from engine.rl.rollout import RolloutWorker
from tests.helpers.coco_fixture import annotation_path
from tests.helpers.eval_world import write_detector
from tests.helpers.paper_commands import STAGE_3, words
from tests.helpers.processes import in_two_processes
from tests.helpers.runs import assert_same, in_child, kill_in_call
from tests.helpers.tiny_rl import held_out, rl_argv, write_rl_world
from tests.helpers.tiny_run import argv, assert_same_run, load_checkpoint, read_metrics
from util.config import parse_args
from util.types import Category

PARTS = ("iou", "confidence", "centroid", "miss", "extra")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_rl_world(tmp_path_factory.mktemp("rl") / "world")


@pytest.fixture(scope="module")
def finished(world) -> Path:
    """The run folder of three updates with pictures and held-out scores."""
    flags = rl_argv(world, "finished", max_rl_steps=3, sample_freq=3, num_preview=1, **held_out(world))
    assert main_rl.main(flags) == 0
    return world / "finished"


# --- the paper's command -------------------------------------------------------------------------------------------


def test_the_papers_command_is_the_papers(shared):
    printed = (shared / "seeds" / "000_ea522daebb22e4f2.txt").read_text()
    assert STAGE_3.strip() in printed


def test_the_papers_values_arrive():
    args = parse_args(rl_parser(), words(STAGE_3))
    assert (args.epochs, args.batch_size, args.group_size, args.num_iter) == (10, 4, 4, 256)
    assert (args.rl_step_ratio, args.kl_coef, args.lr, args.grad_checkpointing) == (1.0, 0.02, 1e-6, True)
    assert (rl_estimator(args), args.rl_mix, args.adv_norm, args.rl_train) == ("elbo", "loss", "zscore", "all")
    assert (args.w_iou, args.w_confidence, args.w_centroid, args.w_miss, args.w_extra) == (1.0, 0.2, 0.2, 0.1, 0.05)
    assert (args.cfg, args.inner_epochs, args.weight_decay, args.ema_rate) == (1.0, 2, 0.0, 0.995)
    config = model_config(args, 80, 512)
    assert (config.encoder_embed_dim, config.diffloss_d, config.diffloss_w, config.num_tokens) == (1280, 12, 1536, 256)


@pytest.mark.integration
def test_the_papers_command_runs_and_resumes(world, caplog):
    """Paths, device, length and sizes changed, and nothing else; one update, then the second by the same command."""
    small = argv(
        world, "paper", resume=world / "sft" / "checkpoint-last.pth", detector_path=world / "detector.pth",
        epochs=None, warmup_epochs=None, lr=None, batch_size=None, log_freq=None, num_iter=4, num_sampling_steps=4,
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        assert main_rl.main([*words(STAGE_3), *small, "--max_rl_steps", "1"]) == 0
        assert main_rl.main([*words(STAGE_3), *small, "--max_rl_steps", "2"]) == 0
    assert "continuing stage 'grpo'" in caplog.text
    state = load_checkpoint(world, "paper")
    assert (state["stage"], state["step"]) == ("grpo", 2)
    lines = read_metrics(world, "paper")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["skipped"] == 0 for line in lines)


def test_every_flag_has_help():
    for action in rl_parser()._actions:
        assert action.help, action.dest


# --- the run folder ------------------------------------------------------------------------------------------------


def test_what_is_logged(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    updates, rounds = [each for each in lines if "reward" in each], [each for each in lines if "eval/AP50" in each]
    assert [line["step"] for line in updates] == [1, 2, 3]
    assert [line["step"] for line in rounds] == [0, 1, 2, 3]  # the start is scored too
    parts = {f"reward/{part}{spread}" for part in PARTS for spread in ("", "_std")}
    ratio = {"ratio_mean", "ratio_min", "ratio_max", "log_ratio_std", "clip_high", "clip_low", "approx_kl", "kl"}
    assert set(updates[0]) >= parts | ratio | {
        "reward_std", "group_std", "zero_std_share", "advantage_abs", "loss", "policy_loss", "grad_norm", "token_std",
        "rollout_seconds", "update_seconds", "skipped", "lr",
    }  # fmt: skip
    log = (finished / "log.txt").read_text()
    assert "4 images, 3 iterations, 18 head calls one after the other" in log
    assert "an update took" in log and "2 more updates take" in log


def test_rollouts_are_pictures(finished):
    assert min(Image.open(finished / "rollouts" / "step-0000003.png").size) > 32
    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    assert events.Tags()["images"] == ["rollouts"]
    assert "eval/AP50" in events.Tags()["scalars"]


def test_the_checkpoint_knows_its_reward_and_its_start(finished, world):
    state, start = load_checkpoint(world, "finished"), load_checkpoint(world, "sft")
    assert len(state["reward_detector"]) == 64
    assert set(state["reference"]) == set(state["model_ema"]) == set(start["model_ema"])
    assert all(torch.equal(tensor, start["model_ema"][name]) for name, tensor in state["reference"].items())
    assert any(not torch.equal(tensor, state["model"][name]) for name, tensor in state["reference"].items())
    assert state["sampling"] == start["sampling"] and state["sampling"]["num_iter"] == 64  # not the rollouts' 3


def test_pictures_and_scores_change_nothing(finished, world):
    main_rl.main(rl_argv(world, "plain", max_rl_steps=3))
    assert_same(load_checkpoint(world, "plain")["model"], load_checkpoint(world, "finished")["model"])


def test_no_image_is_read(world, tmp_path):
    """Pure RL needs captions and boxes alone."""
    root = tmp_path / "coco"
    shutil.copytree(world / "coco" / "annotations", root / "annotations")
    assert main_rl.main(rl_argv(world, "blind", coco_root=root, max_rl_steps=1)) == 0
    with pytest.raises(SystemExit, match="image folder not found"):
        main_rl.main(rl_argv(world, "mixed_blind", coco_root=root, rl_step_ratio=0.5))


def test_a_mixture_trains_on_both(world):
    main_rl.main(rl_argv(world, "mixed", rl_step_ratio=0.5, max_rl_steps=1))
    assert {"sft_loss", "policy_loss", "reward"} <= set(read_metrics(world, "mixed")[0])


def test_pure_sft_samples_nothing(world, monkeypatch):
    def refuse(*args: Any) -> None:
        raise AssertionError("a rollout at rl_step_ratio 0")

    monkeypatch.setattr(RolloutWorker, "collect", refuse)
    main_rl.main(rl_argv(world, "sft_only", rl_step_ratio=0, max_rl_steps=1))
    line = read_metrics(world, "sft_only")[0]
    assert line["sft_loss"] > 0
    assert "policy_loss" not in line


@pytest.mark.parametrize(
    "flags",
    [
        {"rl_estimator": "trajectory", "rl_draws": None, "kl_estimator": "exact"},
        {"kl_estimator": "eps", "adv_norm": "batch", "accum_iter": 2},
        {"kl_coef": 0, "rl_train": "backbone"},
        {"rl_train": "adapters", "precision": "bf16", "num_train_samples": 4},
        {"rl_mix": "step", "rl_step_ratio": 0.5, "adv_norm": "center", "cfg": 2.0},
        {"objective": "nft", "credit": "region", "nft_beta": 0.5, "rl_t_min": 600},
        {"objective": "best_of", "inner_epochs": 1, "cfg": 2.0},
    ],
    ids=lambda flags: "-".join(map(str, flags.values())),
)
def test_the_other_ways(world, flags):
    output = "way-" + "-".join(flags)
    assert main_rl.main(rl_argv(world, output, **flags)) == 0
    assert len(read_metrics(world, output)) == 2
    assert load_checkpoint(world, output)["step"] == 2


def test_what_samples_are_drawn_from(world):
    main_rl.main(rl_argv(world, "few", num_train_samples=4, max_rl_steps=None, epochs=2))
    assert load_checkpoint(world, "few")["step"] == 2 * (4 // 2)


# --- stopping, killing, continuing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        (RolloutWorker, "collect", 2),  # one per update: killed in the third
        (engine.rl.step.GrpoStep, "rl_backward", 2 * 4 + 3),  # four per update: killed in the third
    ],
)
def test_killed_and_continued_is_uninterrupted(world, finished, owner, name, calls):
    output = f"killed_{name}"

    def run() -> int:
        kill_in_call(owner, name, calls)
        return main_rl.main(rl_argv(world, output, save_freq_steps=1, **flags))

    flags = {"max_rl_steps": 3, "sample_freq": 3, "num_preview": 1, **held_out(world)}
    assert in_child(run) == -signal.SIGKILL
    assert load_checkpoint(world, output)["step"] == 2
    main_rl.main(rl_argv(world, output, **flags))
    assert_same_run(world, output, "finished")


def test_a_guard_that_stops_ends_the_run(world, monkeypatch):
    monkeypatch.setattr("engine.rl.guard.OverOptimisationGuard.update", lambda *args: "step 1: fooled")
    flags = {**held_out(world), "guard": "stop"}
    assert main_rl.main(rl_argv(world, "fooled", **flags)) == 0
    assert load_checkpoint(world, "fooled")["step"] == 0  # the start itself was scored
    assert "ending at step 0: step 1: fooled" in (world / "fooled" / "log.txt").read_text()


@pytest.mark.integration
def test_two_processes(world):
    run = rl_argv(world, "two", **held_out(world))
    in_two_processes(lambda _: main_rl.main(run), join_group=False)
    lines = read_metrics(world, "two")
    assert [line["step"] for line in lines if "reward" in line] == [1, 2]
    assert load_checkpoint(world, "two")["step"] == 2


@pytest.mark.integration
def test_two_processes_sharded(world):
    in_two_processes(lambda _: main_rl.main(rl_argv(world, "sharded", fsdp=True)), join_group=False)
    in_two_processes(lambda _: main_rl.main(rl_argv(world, "replicated")), join_group=False)
    one, other = load_checkpoint(world, "sharded")["model"], load_checkpoint(world, "replicated")["model"]
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], atol=2e-5) for name in one)


# --- mistakes ------------------------------------------------------------------------------------------------------


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"group_size": 1}, "--group_size must be at least 2: advantages compare images of one prompt, got 1"),
    ({"detector_path": "nowhere.pth"}, "--detector_path nowhere.pth does not exist"),
    ({"resume": None}, "--resume is needed: stage 3 starts from a stage-2 checkpoint"),
    ({"rl_step_ratio": 1.5}, "--rl_step_ratio must lie in [0, 1], got 1.5"),
    ({"rl_step_ratio": -0.5}, "--rl_step_ratio must lie in [0, 1], got -0.5"),
    ({"kl_coef": -1}, "--kl_coef must not be negative, got -1.0"),
    ({"kl_estimator": "exact"}, "--kl_estimator exact does not go with --rl_estimator elbo"),
    ({"kl_estimator": "eps", "rl_estimator": "trajectory"}, "--kl_estimator eps does not go with --rl_estimator traj"),
    (
        {"objective": "nft", "rl_estimator": "trajectory"},
        "--objective nft goes with --rl_estimator elbo, got trajectory",
    ),
    ({"objective": "nft", "clip_range": 0.1}, "--clip_range 0.1 is for --objective grpo, got nft"),
    ({"nft_beta": 0.1}, "--nft_beta 0.1 is for --objective nft, got grpo"),
    ({"objective": "best_of", "credit": "region"}, "--credit region does not go with --objective best_of"),
    ({"adv_norm": "batch", "credit": "region"}, "--credit region does not go with --adv_norm batch"),
    ({"rl_draws": 3}, "--rl_draws must be even for --rl_estimator elbo (each noise goes with its negative), got 3"),
    ({"rl_t_min": 500, "rl_t_max": 500}, "--rl_t_min 500 must lie below --rl_t_max 500"),
    ({"rl_t_min": 500, "rl_estimator": "trajectory"}, "--rl_t_min 500 and --rl_t_max 1000 are for --rl_estimator elbo"),
    ({"rl_masks": 4}, "num_masks must lie between 1 and num_iter = 3, got 4"),
    ({"num_iter": 17}, "num_iter must lie between 1 and the number of tokens, 16, got 17"),
    ({"temperature": 0}, "--temperature 0 samples the same image for a whole group"),
    ({"layout_scale": 0.5}, "--layout_scale 0.5 does not go with stage 3, whose log-probabilities are of captions and"),
    ({"crop": "random"}, "--crop random: stage 3 takes centre crops"),
    ({"w_quality": 1.0}, "--w_quality and --quality_clip_path belong together, got 1.0 and ''"),
    ({"reward_full_score": 0}, "--reward_full_score must lie in (0, 1], got 0.0"),
    ({"num_train_samples": 10}, "--num_train_samples 10 is more than the 9 images with boxes"),
    ({"min_area": 0.9}, "is left"),
    ({"batch_size": 10}, "the dataset has 9 items, fewer than one global batch of 10"),
    ({"accum_iter": 5}, "--accum_iter 5 is more than the 4 batches of an epoch"),
    ({"fsdp": True}, "start with torchrun --nproc_per_node N main_rl.py"),
]


def refused(world: Path, **flags: Any) -> str:
    """What a run says that is refused; its output folder must not exist."""
    with pytest.raises(SystemExit) as caught:
        main_rl.main(rl_argv(world, "refused", **flags))
    assert not (world / "refused").exists()
    message = str(caught.value)
    assert message.startswith("main_rl.py: error: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("flags", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes_stop_it_before_it_writes(world, flags, message):
    assert message in refused(world, **flags)


MakeFile = Callable[[Path, Path], Path]
FILES: list[tuple[str, MakeFile, str]] = [
    ("resume", lambda world, _: world / "mar.safetensors", "stage 3 starts from a stage-2 checkpoint, not from MAR's"),
    ("detector_path", lambda world, _: world / "vae.ckpt", "is not a detector: it has no entry 'arch'"),
    (
        "detector_path",
        lambda _, folder: write_detector(folder / "few.pth", [Category(1, "tomato")]),
        "does not know leaf, plum, lemon of the dataset's 4 categories: it cannot reward them",
    ),
]


@pytest.mark.parametrize(("flag", "make", "message"), FILES)
def test_wrong_files(world, tmp_path, flag, make, message):
    assert message in refused(world, **{flag: make(world, tmp_path)})


def test_the_rewarding_detector_does_not_judge(world):
    flags = {**held_out(world), "eval_detector": world / "detector.pth"}
    assert "is the detector that rewards" in refused(world, **flags)


def test_prompts_without_boxes(world, tmp_path):
    root = tmp_path / "coco"
    shutil.copytree(world / "coco" / "annotations", root / "annotations")
    path = annotation_path(root, "instances", "train2014")
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"annotations": []}))
    assert "images without boxes" in refused(world, coco_root=root)


def test_another_detector_does_not_continue_a_run(world, finished):
    flags = rl_argv(world, "finished", detector_path=world / "judge.pth", max_rl_steps=4)
    with pytest.raises(SystemExit, match="was rewarded by the detector"):
        main_rl.main(flags)


def test_without_a_reference_there_is_no_kl_later(world):
    main_rl.main(rl_argv(world, "no_kl", kl_coef=0, max_rl_steps=1))
    assert "kl" not in read_metrics(world, "no_kl")[0]
    with pytest.raises(SystemExit, match="has no reference"):
        main_rl.main(rl_argv(world, "no_kl", max_rl_steps=2))
