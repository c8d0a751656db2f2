"""The update by the gradient of a reward on a tiny world: what moves, what must not, accumulation, processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from engine.rl.reward_gradient import Predictions, RewardGradientStep
from engine.train.parallel import gathered, shard
from engine.train.state import Position
from tests.helpers.gradient_world import darkness, gradient_step, picture_loss, take_update
from tests.helpers.processes import assert_close, in_two_processes
from tests.helpers.rl_world import frozen_copy, variant, weights
from tests.helpers.training import tiny_inputs
from util.distributed import DistInfo


def gradients(step: RewardGradientStep, *batches: Any, number: int = 0) -> dict[str, Tensor]:
    """By name, those that the optimizer sees in one update."""
    seen: dict[str, Tensor] = {}

    def note(*_: Any) -> None:
        given = {name: parameter.grad for name, parameter in step.state.trainable.items()}
        seen.update({name: each.detach().clone() for name, each in given.items() if each is not None})

    handle = step.state.optimizer.register_step_pre_hook(note)
    step.take(Position(0, number, number), iter(batches or [tiny_inputs(2)]))
    handle.remove()
    return seen


def test_the_policy_moves_and_nothing_frozen_does() -> None:
    step = gradient_step(loss=picture_loss(w_colour=1.0, detectors=2, noise=0.1))
    assert step.reference is not None
    frozen = [step.codec.autoencoder, step.reference, *(loss.model for loss, _ in step.picture_loss.detectors)]
    before, start = [weights(module) for module in frozen], weights(step.state.model)
    values = take_update(step)
    assert values["skipped"] == 0.0 and values["grad_norm"] > 0 and values["anchor"] == pytest.approx(0, abs=1e-9)
    assert {"reward", "loss", "colour", "detector0/classifier", "detector1/rpn_box_reg"} <= set(values)
    for module, was in zip(frozen, before, strict=True):
        assert all(torch.equal(was[name], tensor) for name, tensor in module.state_dict().items())
        assert not any(each.training for each in module.modules())
    moved = [name for name, tensor in step.state.model.state_dict().items() if not torch.equal(start[name], tensor)]
    assert any(name.startswith("diffloss") for name in moved) and any("encoder" in name for name in moved)
    assert take_update(step, 1)["anchor"] > 0


def test_every_trainable_weight_takes_part() -> None:
    """DDP searches for no others."""
    step = gradient_step()
    assert gradients(step).keys() == step.state.trainable.keys()
    assert gradients(gradient_step(anchor=0.0, num_steps=2)).keys() == step.state.trainable.keys()


def test_the_loss_falls_and_a_strong_anchor_holds_it() -> None:
    """On the same images. The anchor: how far predictions went at all noise levels."""
    left, held = gradient_step(loss=darkness(), anchor=1e-6), gradient_step(loss=darkness(), anchor=1e4)
    values = {step: [take_update(step) for _ in range(12)] for step in (left, held)}
    rewards = [each["reward"] for each in values[left]]
    assert rewards == sorted(rewards)
    assert values[held][-1]["anchor"] < 0.1 * values[left][-1]["anchor"]


def test_accumulated_batches_count_alike() -> None:
    first, second = tiny_inputs(2, 1), tiny_inputs(2, 2)
    found = gradients(gradient_step(), first, second)
    step, parts = gradient_step(), []
    for micro, inputs in enumerate((first, second)):
        noisy = step.states.draw(step.state.model, inputs, (0, micro, 0))
        step.backward(inputs, noisy, (0, micro, 0), 0.5, is_last=True)
        parts.append(noisy)
    assert not torch.equal(parts[0].noise[:, :1], parts[1].noise[:, :1])
    for name, parameter in step.state.trainable.items():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_a_gradient_that_is_not_finite_is_left_out() -> None:
    step = gradient_step()
    before = weights(step.state.model)
    poisoned = step.state.trainable["decoder_embed.weight"].register_hook(lambda gradient: gradient * torch.nan)
    assert take_update(step)["skipped"] == 1.0
    poisoned.remove()
    assert all(torch.equal(before[name], tensor) for name, tensor in step.state.model.state_dict().items())
    assert take_update(step, 1)["skipped"] == 0.0


def test_observers_hear_the_reward_and_may_ask_for_pictures() -> None:
    heard: list[tuple[Predictions, float]] = []
    step = gradient_step(observers=[lambda predictions, reward: heard.append((predictions(), reward))])

    batch = SimpleNamespace(captions=["one", "two"])
    step.make_inputs = lambda batch, epoch, draws: tiny_inputs(2)
    assert step.take(Position(), iter([batch])) == 2
    ((predictions, reward),) = heard
    assert reward == pytest.approx(step.read()["reward"], rel=1e-5)
    for pictures in (predictions.predicted, predictions.given):
        assert pictures.shape == (2, 3, 32, 32) and float(pictures.min()) >= 0 and float(pictures.max()) <= 1
    assert not torch.equal(predictions.predicted, predictions.given)
    assert list(predictions.captions) == ["one", "two"] and len(predictions.timesteps) == 2


# --- processes -----------------------------------------------------------------------------------------------------


def info(rank: int) -> DistInfo:
    return DistInfo(rank, 2, rank, torch.device("cpu"))


def expected_gradients(**settings: Any) -> dict[str, Tensor]:
    """One process, the batches and draws of both ranks."""
    step = gradient_step(**settings)
    for rank in range(2):
        inputs, key = tiny_inputs(2, rank), (0, 0, rank)
        step.backward(inputs, step.states.draw(step.state.model, inputs, key), key, 0.5, is_last=True)
    return {name: each.grad for name, each in step.state.trainable.items() if each.grad is not None}


def test_two_processes_take_the_update_of_one() -> None:
    expected = expected_gradients(num_steps=2)

    def run(rank: int) -> dict[str, Tensor]:
        step = gradient_step(dist=info(rank), num_steps=2)
        found = gradients(step, tiny_inputs(2, rank))
        return {**found, **{f"weight {name}": tensor for name, tensor in weights(step.state.model).items()}}

    first, second = in_two_processes(run)
    for found in (first, second):
        assert_close({name: found[name] for name in expected}, expected)
    assert all((value == second[name]).all() for name, value in first.items())  # the replicas stay together


def test_sharded_gradients_are_those_of_one_process() -> None:
    """--fsdp: the backbone's pass gathers weights, the head's steps after it theirs."""
    expected = expected_gradients(num_steps=2)

    def run(rank: int) -> dict[str, Tensor]:
        reference = frozen_copy(variant())
        model = variant()
        shard(model, model.fsdp_units(), torch.device("cpu"), 2)
        register_fsdp_forward_method(model, "token_conditions")
        step = gradient_step(model, dist=info(rank), num_steps=2, reference=reference)
        found = gradients(step, tiny_inputs(2, rank))
        assert isinstance(found["decoder_embed.weight"], DTensor)
        return gathered(found)

    for found in in_two_processes(run):
        assert_close(found, expected)
