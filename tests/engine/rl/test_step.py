"""The update of stage 3 on a tiny model: ratios, KL, gradients, the share of the SFT part, steps left out."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from engine.eval.online import OnlineEvaluation
from engine.rl.guard import OverOptimisationGuard
from engine.rl.held_out import HeldOutEvaluation
from engine.rl.update import MAX_SKIPPED
from engine.train.state import Position
from tests.helpers.rl_world import (
    ESTIMATORS,
    Seen,
    batches,
    gradient_of_update,
    grpo_step,
    model_for,
    poison,
    recorded_gradients,
    take,
    weights,
    worker_of,
)
from util.distributed import DistInfo
from util.logging import MetricWriter

every_estimator = pytest.mark.parametrize("estimator", list(ESTIMATORS))
HEAD = ("diffloss.", "code_head.")


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-7, msg=name)


def count_calls(module: nn.Module) -> list[int]:
    """Grows by one with every call of the module itself (for a StructMAR: every loss, not `denoise`)."""
    calls: list[int] = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


# --- the first inner epoch -----------------------------------------------------------------------------------------


@every_estimator
@pytest.mark.parametrize("checkpointing", [False, True])
def test_ratios_are_one_and_the_kl_zero_where_the_weights_are_equal(estimator: str, checkpointing: bool) -> None:
    step = grpo_step(model_for(estimator, grad_checkpointing=checkpointing), estimator)
    first, second = take(step, 0, count=2), take(step, 1, count=2)
    for values in (first, second):
        assert values["ratio_min"] == values["ratio_max"] == values["ratio_mean"] == 1.0
        assert values["log_ratio_std"] == values["clip_high"] == values["clip_low"] == values["approx_kl"] == 0.0
        assert values["skipped"] == 0.0 and values["grad_norm"] > 0
        assert 0 < values["advantage_abs"] < math.sqrt(2) and values["zero_std_share"] == 0.0
    assert first["kl"] == 0.0  # of equal weights
    assert second["kl"] > 0.0
    assert ("replay_gap" in first) == (estimator != "elbo")
    assert first.get("replay_gap", 0.0) < 1e-4 and second.get("replay_gap", 0.0) < 1e-4


@every_estimator
def test_later_inner_epochs_move_away_from_the_old_policy(estimator: str) -> None:
    step = grpo_step(None, estimator, inner_epochs=3)
    with recorded_gradients(step) as seen:
        values = take(step)
    assert len(seen) == 3
    assert values["ratio_min"] < 1.0 < values["ratio_max"] and values["approx_kl"] > 0 and values["kl"] > 0
    assert len(worker_of(step).keys) == 1  # one rollout for all three


@every_estimator
def test_checkpointing_does_not_change_gradients(estimator: str) -> None:
    plain, recomputed = (
        gradient_of_update(grpo_step(model_for(estimator, grad_checkpointing=flag), estimator))
        for flag in (False, True)
    )
    assert_close(recomputed, plain)


@every_estimator
def test_gradients_are_means_over_rollouts(estimator: str) -> None:
    """Two batches in one update: the mean of what each of them asks for alone."""
    whole = gradient_of_update(grpo_step(None, estimator), count=2)
    step, parts = grpo_step(None, estimator), []
    for micro, batch in enumerate(batches(2)):
        rollout = step.worker.collect(cast(Any, batch), (0, micro, 0))
        with recorded_gradients(step) as seen:
            step.optimizer_step(step.score(rollout, 0, micro), [], 1.0, Position(), 0)
        parts.append(seen[0])
        step = grpo_step(None, estimator)
    assert_close(whole, {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]})


def test_the_update_raises_log_probabilities_of_the_better_images() -> None:
    """The gradient's sign: after the step the advantages and the changes of the log-probabilities go together."""
    step = grpo_step(None, "trajectory", lr=1e-4)
    (batch,) = batches()
    passes = step.score(step.worker.collect(cast(Any, batch), (0, 0, 0)), 0, 0)
    step.optimizer_step(passes, [], 1.0, Position(), 0)
    gains = []
    for each in passes:
        with torch.no_grad():
            log_prob = step.estimator.log_probs(step.state.model, each.samples, each.noise).log_prob
        gains.append((each.advantages * (log_prob - each.old.log_prob).mean((1, 2))).mean())
    assert min(gains) > 0


# --- rl_step_ratio -------------------------------------------------------------------------------------------------


def test_at_ratio_one_no_image_is_read() -> None:
    step = grpo_step(rl_step_ratio=1.0)
    losses = count_calls(step.state.model)
    assert step.make_inputs is None
    values = take(step)
    assert not losses and len(worker_of(step).keys) == 1
    assert "sft_loss" not in values and math.isfinite(values["loss"])


@pytest.mark.parametrize("mix", ["loss", "step"])
def test_at_ratio_zero_nothing_is_sampled(mix: str) -> None:
    seen = Seen()
    step = grpo_step(rl_step_ratio=0.0, mix=mix, inner_epochs=3, seen=seen)
    losses = count_calls(step.state.model)
    before = weights(step.state.model)
    assert step.take(Position(), batches(2)) == 4  # images
    values = step.read()
    assert not worker_of(step).keys and not seen.rollouts and not seen.rewards
    assert len(losses) == 2  # one per batch: there are no inner epochs without a rollout
    assert math.isnan(values["reward"]) and math.isfinite(values["sft_loss"])
    assert not torch.equal(before["decoder_embed.weight"], step.state.model.decoder_embed.weight)


@every_estimator
def test_mixed_losses_have_mixed_gradients(estimator: str) -> None:
    rl, sft, mixed = (
        gradient_of_update(grpo_step(None, estimator, rl_step_ratio=ratio), count=2) for ratio in (1.0, 0.0, 0.5)
    )
    assert_close(mixed, {name: 0.5 * rl[name] + 0.5 * sft[name] for name in mixed})
    assert any(not torch.equal(rl[name], sft[name]) for name in rl)


def test_mixed_steps_are_of_one_kind_each() -> None:
    step = grpo_step(rl_step_ratio=0.5, mix="step")
    losses, kinds = count_calls(step.state.model), []
    for number in range(8):
        num_rollouts, num_losses = len(worker_of(step).keys), len(losses)
        values = take(step, number)
        kinds.append(step._rl_share(number) == 1.0)
        assert (len(worker_of(step).keys) > num_rollouts) == kinds[-1]
        assert (len(losses) > num_losses) != kinds[-1]
        assert ("sft_loss" in values) != kinds[-1] and math.isfinite(values["reward"]) == kinds[-1]
    assert len(set(kinds)) == 2


def test_the_coin_is_shared_by_all_processes_and_fair() -> None:
    step, ratio = grpo_step(rl_step_ratio=0.3, mix="step"), 0.3
    shares = []
    for seed in range(200):
        step.config = replace(step.config, seed=seed)
        of_ranks = []
        for rank in range(2):
            step.dist = DistInfo(rank, 2, rank, torch.device("cpu"))
            of_ranks.append(step._rl_share(7))
        assert of_ranks[0] == of_ranks[1]
        shares.append(of_ranks[0])
    assert set(shares) == {0.0, 1.0}
    assert sum(shares) / len(shares) == pytest.approx(ratio, abs=3 * math.sqrt(ratio * (1 - ratio) / 200))
    step.config = replace(step.config, mix="loss")
    assert step._rl_share(7) == ratio


# --- what must not change, or must ---------------------------------------------------------------------------------


@every_estimator
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_off_but_for_the_sft_part(estimator: str, checkpointing: bool) -> None:
    model = model_for(estimator, attn_dropout=0.3, proj_dropout=0.3, grad_checkpointing=checkpointing)
    modes: dict[bool, set[bool]] = {False: set(), True: set()}  # modes that blocks were in, by "this is the SFT part"
    in_loss = [False]
    model.register_forward_pre_hook(lambda *_: in_loss.__setitem__(0, True))
    for block in (*model.encoder_blocks, *model.decoder_blocks):
        block.register_forward_pre_hook(
            lambda block, _: modes[in_loss[0]].update(each.training for each in block.modules())
        )
    step = grpo_step(model, estimator)
    values = take(step)
    assert values["ratio_min"] == values["ratio_max"] == 1.0 and values["kl"] == 0.0
    assert modes == {False: {False}, True: set()}

    step = grpo_step(model, estimator, rl_step_ratio=0.5)
    assert take(step)["ratio_max"] == 1.0
    assert modes == {False: {False}, True: {True}}
    assert not any(module.training for module in model.modules())


@every_estimator
def test_reference_and_frozen_head_stay_and_the_average_follows(estimator: str) -> None:
    step = grpo_step(model_for(estimator, "backbone"), estimator, inner_epochs=2)
    assert step.reference is not None
    start, held = weights(step.state.model), weights(step.reference)
    averages = {name: tensor.clone() for name, tensor in step.state.ema.state_dict().items()}
    assert not any(name.startswith(HEAD) for name in averages)
    for number in range(2):
        take(step, number)
    assert_same(weights(step.reference), held)
    for name, tensor in step.state.model.state_dict().items():
        if name.startswith(HEAD):
            assert torch.equal(tensor, start[name]), name
    moved = step.state.trainable["decoder_embed.weight"].detach() - start["decoder_embed.weight"]
    followed = step.state.ema.state_dict()["decoder_embed.weight"] - averages["decoder_embed.weight"]
    assert 0 < float(followed.norm()) < float(moved.norm())
    assert float((followed * moved).sum()) > 0


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    inner = [getattr(value, each.name) for each in fields(value)] if is_dataclass(value) else []
    return [tensor for each in inner for tensor in tensors_in(each)]


@every_estimator
def test_no_inference_tensor_and_no_old_gradient_reaches_the_update(estimator: str) -> None:
    step = grpo_step(None, estimator)
    (batch,) = batches()
    passes = step.score(step.worker.collect(cast(Any, batch), (0, 0, 0)), 0, 0)
    assert len(passes) == 2
    for each in passes:
        found = tensors_in(each)
        assert len(found) > 10
        assert not any(tensor.is_inference() or tensor.requires_grad for tensor in found)


# --- gradients that are not finite ---------------------------------------------------------------------------------


def test_a_step_without_a_finite_gradient_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    step = grpo_step()
    before, averages = weights(step.state.model), dict(step.state.ema.state_dict())
    averages = {name: tensor.clone() for name, tensor in averages.items()}
    poisoned = poison(step)
    with caplog.at_level(logging.WARNING):
        values = take(step, 3)
    assert values["skipped"] == 1.0 and "grad_norm" in values and math.isnan(values["grad_norm"])
    assert "step 3: the gradient is not finite" in caplog.text
    assert_same(weights(step.state.model), before)
    assert_same(step.state.ema.state_dict(), averages)
    assert not step.state.optimizer.state
    assert all(parameter.grad is None for parameter in step.state.trainable.values())

    poisoned.remove()
    values = take(step, 4)
    assert values["skipped"] == 0.0 and step.update.skipped_in_a_row == 0 and values["grad_norm"] > 0
    assert not torch.equal(before["decoder_embed.weight"], step.state.model.decoder_embed.weight)


def test_too_many_in_a_row_end_the_run() -> None:
    step = grpo_step(inner_epochs=MAX_SKIPPED // 2, dist=DistInfo(1, 2, 1, torch.device("cpu")))
    poisoned = poison(step)
    take(step, 0)
    poisoned.remove()
    take(step, 1)  # the count starts again
    poison(step)
    take(step, 2)
    assert step.update.skipped_in_a_row == MAX_SKIPPED // 2
    with pytest.raises(FloatingPointError, match=rf"{MAX_SKIPPED} optimizer steps in a row.*step 3 \(rank 1\)"):
        take(step, 3)


# --- held-out evaluation -------------------------------------------------------------------------------------------


@dataclass
class Scores:
    """In place of an OnlineEvaluation: scores given beforehand."""

    ap50: list[float]
    steps: list[int] = field(default_factory=list)

    def score(self, step: int, _writer: MetricWriter) -> dict[str, float]:
        self.steps.append(step)
        return {"AP50": self.ap50[len(self.steps) - 1]}


def held_out(mode: str, ap50: list[float]) -> HeldOutEvaluation:
    return HeldOutEvaluation(cast(OnlineEvaluation, Scores(ap50)), OverOptimisationGuard(mode, patience=1))


def hear(evaluation: HeldOutEvaluation, step: int, rewards: list[float]) -> str | None:
    for reward in rewards:
        evaluation.note([], reward)
    with MetricWriter(None) as writer:
        return evaluation(step, writer)


def test_updates_hand_rollouts_and_their_mean_reward_to_observers() -> None:
    seen = Seen()
    step = grpo_step(seen=seen)
    logged = [take(step, number, count=2)["reward"] for number in range(2)]
    assert seen.rewards == pytest.approx(logged)
    assert [len(rollout) for rollout in seen.rollouts] == [2 * worker_of(step).group_size] * 4


def test_rewards_are_handed_over_once() -> None:
    evaluation = held_out("warn", [0.5, 0.6, 0.6])
    assert hear(evaluation, 0, []) is None  # before the first update
    assert evaluation.guard.state()["best_reward"] is None
    assert hear(evaluation, 10, [1.0, 2.0]) is None
    assert evaluation.guard.state()["best_reward"] == 1.5 and evaluation.rewards == []
    assert cast(Scores, evaluation.online).steps == [0, 10]


@pytest.mark.parametrize("mode", ["off", "warn", "stop"])
def test_only_the_guard_that_stops_ends_the_run(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    evaluation = held_out(mode, [0.6, 0.5])
    hear(evaluation, 10, [0.5])
    with caplog.at_level(logging.WARNING):
        reason = hear(evaluation, 20, [0.7])
    assert (reason is not None) == (mode == "stop")
    assert ("fooling the reward" in caplog.text) == (mode != "off")


def test_a_continued_run_hears_what_one_without_a_break_does() -> None:
    first = held_out("stop", [0.6, 0.5])
    hear(first, 10, [0.4])
    first.note([], 0.3)
    state = first.state()
    assert state == {"guard": first.guard.state(), "rewards": [0.3]}

    second = held_out("stop", [0.5])
    second.restore(None)
    assert not second.rewards and second.guard.state()["best_ap50"] is None
    second.restore(state)
    assert second.state() == state
    second.note([], 0.9)
    state["rewards"].append(5.0)  # the checkpoint's own list
    assert second.state()["rewards"] == [0.3, 0.9]
    first.note([], 0.9)
    assert hear(second, 20, []) == hear(first, 20, []) is not None
