"""main_rl.py's objectives as a user meets them: one after another, and from weights that are sampled with guidance."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import main_rl
from engine.checkpoint.load import export_weights
from models.sampling.config import SamplingConfig
from tests.helpers.runs import assert_same
from tests.helpers.tiny_rl import rl_argv, write_rl_world
from tests.helpers.tiny_run import load_checkpoint


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_rl_world(tmp_path_factory.mktemp("objectives") / "world")


@pytest.fixture(scope="module")
def finished(world) -> Path:
    """The run folder of one update of GRPO."""
    assert main_rl.main(rl_argv(world, "finished", max_rl_steps=1)) == 0
    return world / "finished"


def test_another_objective_does_not_continue_a_run(world, finished):
    with pytest.raises(SystemExit, match="was written by stage 'grpo', this run is stage 'nft'"):
        main_rl.main(rl_argv(world, "finished", objective="nft", max_rl_steps=4))


def test_one_objective_starts_from_anothers_average(world, finished, caplog):
    before = load_checkpoint(world, "finished")["model_ema"]
    flags = {"objective": "nft", "resume": finished / "checkpoint-last.pth", "max_rl_steps": 1, "cfg": 1.0}
    with caplog.at_level(logging.INFO):
        assert main_rl.main(rl_argv(world, "after", **flags)) == 0
    state = load_checkpoint(world, "after")
    assert (state["stage"], state["step"]) == ("nft", 1)
    assert_same(state["reference"], before)
    assert "sampled with guidance" not in caplog.text


def test_weights_that_are_sampled_with_guidance_are_no_start_without_a_warning(world, tmp_path, caplog):
    start, guided = tmp_path / "guided.safetensors", SamplingConfig(num_iter=3, cfg_text=6.0, cfg_layout=4.0)
    export_weights(world / "sft" / "checkpoint-last.pth", start, sampling=guided)
    main_rl.main(rl_argv(world, "without", resume=start, cfg=1.0, check_data=True))
    assert "guided.safetensors is sampled with guidance (text 6, layout 4), but this run trains it" in caplog.text
    caplog.clear()
    main_rl.main(rl_argv(world, "with", resume=start, check_data=True))
    assert "is sampled with guidance" not in caplog.text
    assert "--rl_estimator elbo scores without guidance what is sampled with it (--cfg): off-policy" in caplog.text
