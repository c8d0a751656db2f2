"""Two processes (gloo) take the update of one: gradients, groups that teach nothing, steps left out, noise, shards."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from engine.rl.objectives import BestOf, Nft
from engine.rl.step import GrpoStep
from engine.train.parallel import gathered, shard
from engine.train.state import Position
from tests.helpers.processes import assert_close, in_two_processes
from tests.helpers.rl_world import (
    ESTIMATORS,
    Seen,
    TokenReward,
    brightness,
    grpo_step,
    model_for,
    poison,
    recorded_gradients,
    weights,
)
from tests.helpers.training import tiny_inputs
from util.distributed import DistInfo


def info(rank: int) -> DistInfo:
    return DistInfo(rank, 2, rank, torch.device("cpu"))


def take_own(step: GrpoStep, number: int = 0) -> dict[str, float]:
    """One update on this process's own batch."""
    step.take(Position(0, number, number), iter([tiny_inputs(2, step.dist.rank)]))
    return step.read()


def update(rank: int, estimator: str, reward: TokenReward, **settings: Any) -> dict[str, Tensor]:
    """The gradients of a first update, and the weights after a second."""
    step = grpo_step(None, estimator, reward, info(rank), **settings)
    with recorded_gradients(step) as seen:
        take_own(step)
        take_own(step, 1)
    assert len(seen) == 2
    return {**seen[0], **{f"weight {name}": tensor for name, tensor in weights(step.state.model).items()}}


def gradients_of(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if not name.startswith("weight ")}


def expected_gradients(estimator: str, reward: TokenReward, **settings: Any) -> dict[str, Tensor]:
    """One process, the rollouts of both ranks."""
    step, passes = grpo_step(None, estimator, reward, **settings), []
    for rank in range(2):
        step.dist = info(rank)
        rollout = step.worker.collect(cast(Any, tiny_inputs(2, rank)), (0, 0, rank))
        passes += step.score(rollout, 0, 0)
    with recorded_gradients(step) as seen:
        step.optimizer_step(passes, [], 1.0, Position(), 0)
    return seen[0]


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_gradients_are_those_of_one_process_with_both_rollouts(estimator: str) -> None:
    expected = expected_gradients(estimator, brightness)
    first, second = in_two_processes(lambda rank: update(rank, estimator, brightness))
    for found in (first, second):
        assert_close(gradients_of(found), expected)
    for name, value in first.items():
        assert (value == second[name]).all(), name  # weights too: the replicas stay together


def test_mixed_gradients_are_the_mean_of_both_processes() -> None:
    expected: list[dict[str, Tensor]] = []
    for rank in range(2):
        step = grpo_step(None, "elbo", dist=info(rank), rl_step_ratio=0.5)
        with recorded_gradients(step) as seen:
            take_own(step)
        expected += seen
    mean = {name: (expected[0][name] + expected[1][name]) / 2 for name in expected[0]}
    for found in in_two_processes(lambda rank: update(rank, "elbo", brightness, rl_step_ratio=0.5)):
        assert_close(gradients_of(found), mean)


@pytest.mark.parametrize("settings", [{"objective": Nft(), "credit": "region"}, {"objective": BestOf()}], ids=str)
def test_so_it_is_with_the_other_objectives(settings: dict[str, Any]) -> None:
    expected = expected_gradients("elbo", brightness, **settings)
    for found in in_two_processes(lambda rank: update(rank, "elbo", brightness, **settings)):
        assert_close(gradients_of(found), expected)


def test_a_process_whose_groups_teach_nothing_takes_part() -> None:
    """Equal rewards on rank 1: no advantages, no gradient of its own, half of rank 0's in the mean."""
    step = grpo_step(None, "elbo", dist=info(0), kl_coef=0.0)
    with recorded_gradients(step) as seen:
        take_own(step)

    def run(rank: int) -> dict[str, Tensor]:
        return update(rank, "elbo", brightness if rank == 0 else lambda tokens: torch.ones(len(tokens)), kl_coef=0.0)

    for found in in_two_processes(run):
        assert_close(gradients_of(found), {name: gradient / 2 for name, gradient in seen[0].items()})


def test_nan_on_one_process_skips_on_both() -> None:
    def run(rank: int) -> dict[str, Any]:
        step = grpo_step(None, "elbo", dist=info(rank))
        before = weights(step.state.model)
        poisoned = poison(step) if rank == 1 else None
        skipped = take_own(step)["skipped"]
        is_unchanged = all(torch.equal(before[name], each) for name, each in step.state.model.state_dict().items())
        if poisoned is not None:
            poisoned.remove()
        return {"skipped": [skipped, take_own(step, 1)["skipped"]], "is_unchanged": is_unchanged}

    for found in in_two_processes(run):
        assert found == {"skipped": [1.0, 0.0], "is_unchanged": True}


def test_the_norm_is_judged_on_all_processes() -> None:
    """Where only this process's own norm is bad, the other one has to hear of it."""

    def run(rank: int) -> dict[str, Any]:
        step = grpo_step(None, "elbo", dist=info(rank))
        step.state.optimizer.zero_grad()
        for parameter in step.state.trainable.values():
            parameter.grad = torch.full_like(parameter, torch.inf if rank == 1 else 1.0)
        step.optimizer_step([], [], 1.0, Position(), 0)
        return step.read()

    assert [found["skipped"] for found in in_two_processes(run)] == [1.0, 1.0]


def test_processes_sample_and_draw_their_own_noise_and_share_the_statistics() -> None:
    """The same prompts on both: other images, other estimator draws; the batch's std and the guard's reward are one."""

    def run(rank: int) -> dict[str, Any]:
        seen = Seen()
        step = grpo_step(None, "elbo", dist=info(rank), adv_norm="batch", seen=seen)
        batch = cast(Any, tiny_inputs(2))
        step.take(Position(), iter([batch]))
        (rollout,) = seen.rollouts
        passes = step.score(rollout, 0, 0)
        noise, rewards = passes[0].noise.noise, rollout.grouped_rewards()
        assert noise is not None
        return {
            "tokens": rollout.samples.tokens,
            "orders": rollout.samples.orders,
            "noise": noise.flatten()[:64],
            "rewards": rewards,
            "advantages": passes[0].advantages.view_as(rewards),
            "heard": seen.rewards[0],
        }

    first, second = in_two_processes(run)
    for name in ("tokens", "orders", "noise"):
        assert (first[name] != second[name]).any(), name
    rewards = torch.as_tensor([first["rewards"].tolist(), second["rewards"].tolist()])  # [2, B, G]
    centred = rewards - rewards.mean(2, keepdim=True)
    expected = centred / (centred.square().mean().sqrt() + 1e-4)
    for rank, found in enumerate((first, second)):
        torch.testing.assert_close(torch.as_tensor(found["advantages"]), expected[rank], rtol=1e-4, atol=1e-5)
        assert found["heard"] == pytest.approx(float(rewards.mean()), rel=1e-5)


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_sharded_gradients_are_those_of_one_process(estimator: str) -> None:
    """--fsdp: `denoise` or `code_logits` gathers weights, the last pass exchanges gradients, all skip or step alike."""
    expected = expected_gradients(estimator, brightness)

    def run(rank: int) -> dict[str, Tensor]:
        step = grpo_step(model_for(estimator), estimator, dist=info(rank))  # for its reference: a plain copy
        model = model_for(estimator)
        shard(model, model.fsdp_units(), torch.device("cpu"), 2)
        register_fsdp_forward_method(model, "code_logits" if estimator == "exact" else "denoise")
        sharded = grpo_step(model, estimator, dist=info(rank), kl_coef=0.0)
        sharded.worker, sharded.reference = step.worker, step.reference
        with recorded_gradients(sharded) as seen:
            values = take_own(sharded)
        assert values["ratio_min"] == values["ratio_max"] == 1.0 and values["skipped"] == 0.0
        assert isinstance(seen[0]["decoder_embed.weight"], DTensor)
        return gathered(seen[0])

    for found in in_two_processes(run):
        assert_close(found, expected)
