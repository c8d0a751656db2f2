"""Where runs start, what checkpoints hold, and that a run which is stopped or killed ends as one that was not."""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import engine.checkpoint.writer
import engine.train.supervised
import main_mar
from engine.checkpoint.files import read_weights_file
from engine.checkpoint.identity import Identity
from engine.checkpoint.kept import link_last
from engine.checkpoint.resume import check_identity, find_source, log_continuation, resumed_position
from engine.train.state import Course, Position
from engine.train.supervised import SupervisedStep
from models.sampling.config import SamplingConfig
from models.structmar import preset_config
from tests.helpers.runs import assert_same, in_child, kill_in_call
from tests.helpers.tiny_run import SIZES, argv, assert_same_run, load_checkpoint, mar_state, read_metrics, write_world
from util.types import Category


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def flags(world: Path, output: str, **more: Any) -> list[str]:
    """Mid-epoch positions, accumulation and dropout: everything a resumed run could get wrong."""
    return argv(world, output, **({"accum_iter": 2, "attn_dropout": 0.1, "proj_dropout": 0.1, "log_freq": 1} | more))


@pytest.fixture(scope="module")
def reference(world) -> str:
    """Five steps in one go: two epochs of two steps and half of the third."""
    assert main_mar.main(flags(world, "whole", max_steps=5)) == 0
    return "whole"


# --- continuing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [2, 3])
def test_n_and_n_steps_are_two_n_steps(world, reference, first):
    """Stopped at an epoch's end and in its middle."""
    output = f"parts{first}"
    main_mar.main(flags(world, output, max_steps=first))
    stopped = load_checkpoint(world, output)
    assert (stopped["step"], stopped["epoch"], stopped["batch_in_epoch"]) == (first, 1, 2 * (first - 2))
    main_mar.main(flags(world, output, max_steps=5))
    assert_same_run(world, output, reference)


def test_explicit_resume_into_another_folder_continues(world, reference, caplog):
    main_mar.main(flags(world, "source", max_steps=3))
    with caplog.at_level(logging.INFO):
        main_mar.main(flags(world, "target", max_steps=5, resume=world / "source"))
    path = world / "source" / "checkpoint-last.pth"
    assert f"continuing stage 'text_layout' from {path} at epoch 1, step 3 (image 4 of the epoch)" in caplog.text
    first, second = load_checkpoint(world, "target"), load_checkpoint(world, reference)
    assert_same(first["model"], second["model"])
    assert_same(first["optimizer"], second["optimizer"])


def test_killed_in_the_middle_of_a_step(world, reference):
    def run() -> int:
        kill_in_call(SupervisedStep, "take", 3)
        return main_mar.main(flags(world, "killed", max_steps=5, save_freq_steps=1))

    assert in_child(run) == -signal.SIGKILL
    assert load_checkpoint(world, "killed")["step"] == 3
    main_mar.main(flags(world, "killed", max_steps=5))
    assert_same_run(world, "killed", reference)


def test_killed_in_the_middle_of_saving(world, reference):
    """The half-written file is beside the last whole one, which is continued."""

    def run() -> int:
        save, count = torch.save, itertools.count()

        def killing(obj: Any, file: Any) -> None:
            if next(count) == 2:
                file.write(b"PK\x03\x04 the first bytes of a checkpoint")
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            save(obj, file)

        torch.save = killing
        return main_mar.main(flags(world, "half", max_steps=5, save_freq_steps=1))

    assert in_child(run) == -signal.SIGKILL
    assert (world / "half" / "checkpoint-last.pth.tmp").exists()
    assert load_checkpoint(world, "half")["step"] == 2
    main_mar.main(flags(world, "half", max_steps=5))
    assert_same_run(world, "half", reference)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_gives_the_exit_code(world, reference, signum):
    output = f"signal{int(signum)}"

    def run() -> int:
        take = engine.train.supervised.SupervisedStep.take
        count = itertools.count()

        def interrupted(*args: Any) -> int:
            if next(count) == 2:
                os.kill(os.getpid(), signum)
            return take(*args)

        engine.train.supervised.SupervisedStep.take = interrupted
        return main_mar.main(flags(world, output, max_steps=5))

    assert in_child(run) == 128 + signum
    assert load_checkpoint(world, output)["step"] == 3  # the step is finished first
    main_mar.main(flags(world, output, max_steps=5))
    assert_same_run(world, output, reference)


def test_a_finished_run_can_be_started_again(world, reference):
    last = world / reference / "checkpoint-last.pth"
    before = last.read_bytes()
    assert main_mar.main(flags(world, reference, max_steps=5)) == 0
    assert last.read_bytes() == before  # what killed runs are compared by: the learning rate is the position's, too


def test_changed_arguments_are_named(world, reference, caplog):
    main_mar.main(flags(world, reference, max_steps=5, lr=5e-4))
    assert "continuing with another --lr: 0.0005, before 0.001" in caplog.text


def test_no_auto_resume_starts_over(world, caplog):
    main_mar.main(flags(world, "over", max_steps=2))
    main_mar.main(flags(world, "over", max_steps=1, no_auto_resume=True))
    assert load_checkpoint(world, "over")["step"] == 1
    assert [line["step"] for line in read_metrics(world, "over")] == [1]


# --- checkpoints that stay ------------------------------------------------------------------------------------------


def checkpoint_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("checkpoint-*")}


def test_after_a_kill_the_files_are_the_undisturbed_runs(world):
    """Byte for byte; killed after a checkpoint that stays was written, before checkpoint-last.pth became it."""
    command = flags(world, "kept", max_steps=5, keep_every=2)
    assert main_mar.main(command) == 0
    wanted = checkpoint_files(world / "kept")
    assert set(wanted) == {"checkpoint-0000002.pth", "checkpoint-0000004.pth", "checkpoint-last.pth"}
    (world / "kept").rename(world / "undisturbed")

    def run() -> int:
        def killing(kept: Path) -> None:
            if kept.name == "checkpoint-0000004.pth":
                os.kill(os.getpid(), signal.SIGKILL)
            link_last(kept)

        engine.checkpoint.writer.link_last = killing
        return main_mar.main(command)

    assert in_child(run) == -signal.SIGKILL
    assert load_checkpoint(world, "kept")["step"] == 2
    main_mar.main(command)
    assert checkpoint_files(world / "kept") == wanted


def test_a_checkpoint_that_stayed_can_be_continued(world, reference):
    main_mar.main(flags(world, "long", max_steps=4, keep_every=3))
    main_mar.main(flags(world, "branch", max_steps=5, resume=world / "long" / "checkpoint-0000003.pth"))
    back = world / "long"
    shutil.copy(back / "checkpoint-0000003.pth", back / "checkpoint-last.pth")
    main_mar.main(flags(world, "long", max_steps=5))
    whole = load_checkpoint(world, reference)
    for output in ("branch", "long"):
        found = load_checkpoint(world, output)
        assert_same(found["model_ema"], whole["model_ema"])
        assert_same(found["optimizer"]["state"], whole["optimizer"]["state"])


def test_the_average_warms_up_unless_the_run_began_without(world, reference, caplog):
    assert load_checkpoint(world, reference)["args"]["ema_warmup"] is True
    main_mar.main([*flags(world, "before", max_steps=2), "--no-ema_warmup"])
    assert "the average is young: after 2 steps at --ema_rate 0.9999, 100.0 %" in caplog.text
    state = load_checkpoint(world, "before")
    del state["args"]["ema_warmup"]  # as the files of before the flag
    torch.save(state, world / "before" / "checkpoint-last.pth")
    for steps in (3, 4):
        main_mar.main(flags(world, "before", max_steps=steps))
        assert load_checkpoint(world, "before")["args"]["ema_warmup"] is False


# --- starting from -------------------------------------------------------------------------------------------------


def test_stage_2_starts_from_the_averages_of_stage_1(world, reference, caplog):
    """Epoch 0, fresh optimizer, EMA weights: the paper's second command."""
    path = world / reference / "checkpoint-last.pth"
    with caplog.at_level(logging.INFO):
        main_mar.main(argv(world, "stage2", resume=path, train_mode="full", max_steps=1, lr=1e-30))
    expected = (
        f"starting stage 'full' at epoch 0 with a fresh optimizer from the EMA weights of {path} "
        "(stage 'text_layout', epoch 2, step 5)"
    )
    assert expected in caplog.text
    first, second = load_checkpoint(world, reference), load_checkpoint(world, "stage2")
    assert (second["stage"], second["step"], second["epoch"], second["batch_in_epoch"]) == ("full", 1, 0, 1)
    steps = {int(state["step"]) for state in second["optimizer"]["state"].values()}
    assert steps == {1}
    assert set(first["model_ema"]) < set(second["model_ema"])
    for name, tensor in second["model"].items():  # a step too small to change what was loaded
        expected_tensor = first["model_ema"].get(name, first["model"][name])
        torch.testing.assert_close(tensor, expected_tensor, rtol=0, atol=1e-20, msg=name)


def test_mars_own_checkpoint_with_its_namespace(world):
    """Averaged weights are preferred; the optimizer and the arguments in it are left alone."""
    state = mar_state()
    averaged = {name: tensor + 1 for name, tensor in state.items()}
    folder = world / "mar_run"
    folder.mkdir()
    content = {"model": state, "model_ema": averaged, "optimizer": {}, "epoch": 399, "args": argparse.Namespace(lr=1)}
    torch.save(content, folder / "checkpoint-last.pth")
    main_mar.main(argv(world, "from_mar", resume=folder, max_steps=1))
    loaded = load_checkpoint(world, "from_mar")
    assert loaded["step"] == 1
    assert torch.equal(loaded["model"]["z_proj.weight"], averaged["z_proj.weight"])


def test_from_scratch_rotates_fully(world, caplog):
    main_mar.main(argv(world, "scratch", resume=None, train_mode="full", max_steps=1, lr=1e-30))
    assert "from scratch: no --resume was given" in caplog.text
    strengths = [t for name, t in load_checkpoint(world, "scratch")["model"].items() if name.endswith("rope_strength")]
    assert strengths
    assert all(float(strength) == 1.0 for strength in strengths)


def test_another_stages_checkpoint_in_the_output_folder_is_not_overwritten(world, reference):
    with pytest.raises(SystemExit, match=r"was written by stage 'text_layout', this run is stage 'full'"):
        main_mar.main(argv(world, reference, train_mode="full", max_steps=1))


# --- what a checkpoint holds ---------------------------------------------------------------------------------------


def test_content(world, reference):
    state = load_checkpoint(world, reference)
    trainable = set(state["model_ema"])
    assert state["format"] == 1
    assert state["stage"] == "text_layout"
    assert {name for group in state["optimizer"]["param_groups"] for name in group["params"]} == trainable
    assert trainable < set(state["model"])
    assert state["vae"]["latent_scale"] == 0.5
    assert len(state["vae"]["id"]) == len(state["text_encoder"]["id"]) == 64
    assert [category["id"] for category in state["categories"]] == [1, 3, 44, 90]
    assert state["args"]["accum_iter"] == 2
    assert state["config"]["num_categories"] == 4
    sampling = state["sampling"]  # the flags of the run's previews
    assert (sampling["head"], sampling["num_iter"], sampling["num_sampling_steps"]) == ("diffusion", 64, 100)
    assert sampling == SamplingConfig().to_dict()


def identity(**changes: Any) -> Identity:
    values = {
        "config": preset_config("mar_mini", **SIZES, num_categories=2, text_dim=16),
        "vae_id": "vae-a",
        "latent_scale": 0.5,
        "text_encoder_id": "clip-a",
        "categories": (Category(1, "cat"), Category(2, "dog")),
        "stage": "full",
        "step": 9,
    }
    return Identity(**(values | changes))


def minimal_checkpoint(path: Path) -> Path:
    state = {"format": 1, "model": {"text_null": torch.zeros(1)}, "model_ema": {}, "optimizer": {}}
    counts = {"epoch": 2, "batch_in_epoch": 6, "global_batch": 8, "args": {}}
    torch.save(state | counts | identity().to_dict(), path / "checkpoint-last.pth")
    return path / "checkpoint-last.pth"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vae_id": "vae-b"}, "made with vae id vae-a, this run has vae-b"),
        ({"latent_scale": 0.2325}, "made with vae latent_scale 0.5, this run has 0.2325"),
        ({"text_encoder_id": "clip-b"}, "made with text_encoder id clip-a, this run has clip-b"),
        (
            {"categories": (Category(1, "cat"), Category(3, "cow"))},
            "categories {'id': 2, 'name': 'dog'}, this run has {'id': 3, 'name': 'cow'}",
        ),
        (
            {"config": preset_config("mar_mini", **(SIZES | {"diffloss_w": 64}), num_categories=2, text_dim=16)},
            "another architecture: diffloss_w 32 in the file, 64 here",
        ),
    ],
)
def test_weights_of_another_identity_are_refused(tmp_path, changes, message):
    path = minimal_checkpoint(tmp_path)
    source = find_source(tmp_path / "new", str(path), True, "text_layout")
    assert source.kind == "start"
    check_identity(source, identity())
    with pytest.raises(ValueError) as caught:
        check_identity(source, identity(**changes))
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_dropout_and_memory_options_may_change(tmp_path):
    options = {"attn_dropout": 0.1, "grad_checkpointing": True}
    config = preset_config("mar_mini", **SIZES, **options, num_categories=2, text_dim=16)
    check_identity(find_source(tmp_path, str(minimal_checkpoint(tmp_path)), False, "full"), identity(config=config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has checkpoint format 2, this version reads 1"),
        ({"vae": None}, r"is a checkpoint without \['vae'\]"),
    ],
)
def test_unknown_formats(tmp_path, change, message):
    path = minimal_checkpoint(tmp_path)
    state = {key: value for key, value in (torch.load(path) | change).items() if value is not None}
    torch.save(state, path)
    with pytest.raises(ValueError, match=message):
        read_weights_file(path)


def test_something_else_is_refused(tmp_path):
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"nor MAR's or MaskGIL's weights; it holds \['weights'\]"):
        read_weights_file(tmp_path / "other.pth")


def test_position_with_other_batch_sizes(tmp_path, caplog):
    source = find_source(tmp_path, str(minimal_checkpoint(tmp_path)), True, "full")
    assert source.kind == "continue"
    for images_per_step in (8, 16, 32):
        assert resumed_position(source, Course(80, images_per_step, epochs=4)) == Position(2, 9, 48)
    too_large = Course(80, 40, epochs=4)  # 32 images are left
    assert resumed_position(source, too_large) == Position(3, 9, 0)
    log_continuation(source, too_large, 40)
    assert "was written with 8 images per pass, here are 40" in caplog.text
    assert "the last 32 images of epoch 2 do not fill a step of 40" in caplog.text
    assert "nothing is left" not in caplog.text
    log_continuation(source, Course(80, 40, epochs=3), 40)
    assert "nothing is left to do" in caplog.text
