"""Advantages, the clipped surrogate and the KL penalties, against values worked out by hand and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from engine.rl.grpo import (
    clipped_surrogate,
    group_advantages,
    kl_penalty,
    zero_std_share,
)
from engine.rl.settings import ADV_NORMS, KL_ESTIMATORS
from models.policy.base import PolicyOutput

CLIP = 0.2


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- advantages


def test_zscore_by_hand() -> None:
    advantages = group_advantages(torch.tensor([[1.0, 2.0, 3.0, 6.0]]), "zscore")  # mean 3, variance 14 / 4
    expected = torch.tensor([[-2.0, -1.0, 0.0, 3.0]]) / (math.sqrt(3.5) + 1e-4)
    torch.testing.assert_close(advantages, expected)


def test_other_norms_by_hand() -> None:
    rewards = torch.tensor([[1.0, 3.0], [10.0, 16.0]])
    torch.testing.assert_close(group_advantages(rewards, "center"), torch.tensor([[-1.0, 1.0], [-3.0, 3.0]]))
    batch = group_advantages(rewards, "batch", batch_std=1.9999)
    torch.testing.assert_close(batch, torch.tensor([[-0.5, 0.5], [-1.5, 1.5]]))
    torch.testing.assert_close(group_advantages(rewards, "none", clip=12.0), torch.tensor([[1.0, 3.0], [10.0, 12.0]]))


@pytest.mark.parametrize("norm", ADV_NORMS)
def test_advantages_are_clipped_to_both_sides(norm: str) -> None:
    advantages = group_advantages(torch.tensor([[-90.0, 90.0]]), norm, batch_std=1.0, clip=0.5)
    assert advantages.tolist() == [[-0.5, 0.5]]


def test_zscores_have_mean_zero_and_are_bounded_by_the_group_size() -> None:
    rewards = normal(50, 5)
    rewards[0] = torch.tensor([0.0, 0.0, 0.0, 0.0, 100.0])  # the extreme group: one against all others
    advantages = group_advantages(rewards, "zscore")
    torch.testing.assert_close(advantages.mean(1), torch.zeros(50), atol=1e-6, rtol=0)
    assert advantages.abs().max() <= math.sqrt(5 - 1)
    assert advantages[0, 4] == pytest.approx(2.0, abs=1e-4)


@pytest.mark.parametrize("norm", ["zscore", "center", "batch"])
def test_equal_rewards_give_exactly_zero(norm: str) -> None:
    rewards = torch.full((2, 7), 0.1)  # the mean of seven 0.1 is not 0.1 in float32
    rewards[1, 6] = 0.4
    advantages = group_advantages(rewards, norm, batch_std=0.0)
    assert advantages[0].tolist() == [0.0] * 7
    assert advantages[1].abs().min() > 0


@pytest.mark.parametrize("norm", ADV_NORMS)
def test_groups_never_mix(norm: str) -> None:
    rewards = normal(3, 4)
    changed = rewards.clone()
    changed[1] = normal(4, seed=1) * 7
    before, after = (group_advantages(each, norm, batch_std=1.0) for each in (rewards, changed))
    assert torch.equal(before[[0, 2]], after[[0, 2]]) and not torch.equal(before[1], after[1])


def test_zero_std_share_counts_flat_groups() -> None:
    assert zero_std_share(torch.tensor([[0.1, 0.1, 0.1], [1.0, 1.0, 1.1], [0.0, 0.0, 0.0], [0.0, 1.0, 2.0]])) == 0.5


@pytest.mark.parametrize(
    ("rewards", "norm", "batch_std", "clip", "message"),
    [
        (torch.ones(4), "zscore", None, 5.0, r"\[B, G\].*\[4\]"),
        (torch.ones(0, 4), "zscore", None, 5.0, r"\[0, 4\]"),
        (torch.ones(4, 1), "zscore", None, 5.0, "G must be >= 2, got 1"),
        (torch.tensor([[1.0, math.nan]]), "none", None, 5.0, "finite, got"),
        (torch.ones(2, 2), "rank", None, 5.0, "zscore, center, batch, none, got 'rank'"),
        (torch.ones(2, 2), "batch", None, 5.0, "batch_std.*None"),
        (torch.ones(2, 2), "batch", math.nan, 5.0, "batch_std.*nan"),
        (torch.ones(2, 2), "center", None, 0.0, "clip must be above 0, got 0.0"),
    ],
)
def test_advantages_refuse(rewards: Tensor, norm: str, batch_std: float | None, clip: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, norm, batch_std, clip)


# ---- the surrogate


def surrogate_gradient(ratio: float, advantage: float, dual_clip: float | None = 3.0) -> tuple[float, float]:
    """The loss of one image with one ratio, and its gradient by the log-probability."""
    log_prob = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    old = torch.zeros(1, 1, dtype=torch.float64)
    loss = clipped_surrogate(log_prob, old, torch.tensor([advantage], dtype=torch.float64), CLIP, dual_clip).loss
    (gradient,) = torch.autograd.grad(loss, log_prob)
    return loss.item(), gradient.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual_clip", "loss", "gradient"),
    [
        (1.0, 2.0, 3.0, -2.0, -2.0),  # on policy: plain policy gradient
        (1.0, -2.0, 3.0, 2.0, 2.0),
        (1.5, 2.0, 3.0, -2.4, 0.0),  # good and already likelier than allowed: stop
        (0.5, -2.0, 3.0, 1.6, 0.0),  # bad and already less likely than allowed: stop
        (0.5, 2.0, 3.0, -1.0, -1.0),  # good but less likely: pull back
        (1.5, -2.0, 3.0, 3.0, 3.0),  # bad but likelier: push back
        (4.0, -2.0, 3.0, 6.0, 0.0),  # bad and far likelier: bounded by 3 |A|
        (4.0, -2.0, None, 8.0, 8.0),
        (4.0, 2.0, None, -2.4, 0.0),
        (4.0, 0.0, 3.0, 0.0, 0.0),
    ],
)
def test_every_corner_of_the_clip(
    ratio: float, advantage: float, dual_clip: float | None, loss: float, gradient: float
) -> None:
    found, slope = surrogate_gradient(ratio, advantage, dual_clip)
    assert found == pytest.approx(loss)
    assert slope == 0 if gradient == 0 else slope == pytest.approx(gradient)


def test_surrogate_is_the_textbook_formula_averaged() -> None:
    log_prob, old, advantages = normal(4, 3, 2), normal(4, 3, 2, seed=1), normal(4, seed=2)
    expected = []
    for image in range(4):
        a = advantages[image].item()
        for new_one, old_one in zip(log_prob[image].flatten().tolist(), old[image].flatten().tolist(), strict=True):
            rho = math.exp(new_one - old_one)
            value = min(rho * a, min(max(rho, 1 - CLIP), 1 + CLIP) * a)
            expected.append(max(value, 3 * a) if a < 0 else value)
    found = clipped_surrogate(log_prob, old, advantages, CLIP).loss
    assert found.item() == pytest.approx(-sum(expected) / len(expected), rel=1e-5)


def test_at_the_old_policy_the_loss_is_the_negated_mean_advantage() -> None:
    log_prob = normal(4, 3).requires_grad_()
    advantages = torch.tensor([2.0, -1.0, 0.5, -3.5])
    surrogate = clipped_surrogate(log_prob, log_prob.detach().clone(), advantages, CLIP)
    (gradient,) = torch.autograd.grad(surrogate.loss, log_prob)
    assert surrogate.loss.item() == pytest.approx(0.5)
    torch.testing.assert_close(gradient, -advantages[:, None].expand(4, 3) / 12)
    exact = {"ratio_mean": 1, "ratio_min": 1, "ratio_max": 1, "log_ratio_std": 0, "approx_kl": 0}
    assert {name: value.item() for name, value in surrogate.stats.items()} == exact | {"clip_high": 0, "clip_low": 0}


def test_stats_by_hand() -> None:
    ratios = torch.tensor([[2.0, 0.5], [2.0, 0.5], [4.0, 1.0], [1.1, 0.9]], requires_grad=True)
    stats = clipped_surrogate(ratios.log(), torch.zeros(4, 2), torch.tensor([1.0, -1.0, -1.0, 1.0]), CLIP).stats
    assert not any(value.requires_grad or value.dim() for value in stats.values())
    found = {name: value.item() for name, value in stats.items()}
    assert found["clip_high"] == 2 / 8  # ratio 2 with A > 0, and ratio 4 with A < 0 by the dual clip
    assert found["clip_low"] == 1 / 8  # ratio 0.5 with A < 0
    assert (found["ratio_min"], found["ratio_max"]) == pytest.approx((0.5, 4.0))
    assert found["ratio_mean"] == pytest.approx((2 + 0.5 + 2 + 0.5 + 4 + 1 + 1.1 + 0.9) / 8)
    logs = [math.log(each) for each in (2, 0.5, 2, 0.5, 4, 1, 1.1, 0.9)]
    mean = sum(logs) / 8
    assert found["log_ratio_std"] == pytest.approx(math.sqrt(sum((each - mean) ** 2 for each in logs) / 8))
    assert found["approx_kl"] == pytest.approx(found["ratio_mean"] - 1 - mean)


def test_clip_shares_are_the_shares_of_vanished_gradients() -> None:
    log_prob, advantages = (3 * normal(50, 7)).requires_grad_(), normal(50, seed=1)
    surrogate = clipped_surrogate(log_prob, torch.zeros(50, 7), advantages, CLIP)
    (gradient,) = torch.autograd.grad(surrogate.loss, log_prob)
    share = surrogate.stats["clip_high"] + surrogate.stats["clip_low"]
    assert (gradient == 0).float().mean().item() == pytest.approx(share.item())


def test_paper_size_log_ratios_stay_finite() -> None:
    log_prob = torch.tensor([[1e4, -1e4]]).expand(2, 2).clone().requires_grad_()
    surrogate = clipped_surrogate(log_prob, torch.zeros(2, 2), torch.tensor([1.0, -1.0]), CLIP, dual_clip=None)
    surrogate.loss.backward()
    assert surrogate.loss.isfinite() and log_prob.grad is not None and log_prob.grad.isfinite().all()
    assert surrogate.stats["ratio_max"].item() == pytest.approx(math.exp(20), rel=1e-4)


def test_surrogate_refuses() -> None:
    log_prob, advantages = torch.zeros(2, 3), torch.ones(2)
    with pytest.raises(ValueError, match=r"current \[2, 3\].*\[2, 1\]"):  # would broadcast
        clipped_surrogate(log_prob, torch.zeros(2, 1), advantages, CLIP)
    with pytest.raises(ValueError, match=r"advantages \[3\], log_prob \[2, 3\]"):  # would broadcast over tokens
        clipped_surrogate(log_prob, log_prob, torch.ones(3), CLIP)
    with pytest.raises(ValueError, match="has a gradient"):
        clipped_surrogate(log_prob, log_prob.clone().requires_grad_(), advantages, CLIP)
    with pytest.raises(ValueError, match="clip_range must be above 0, got 0"):
        clipped_surrogate(log_prob, log_prob, advantages, 0.0)
    with pytest.raises(ValueError, match="dual_clip must be above 1, or None, got 1.0"):
        clipped_surrogate(log_prob, log_prob, advantages, CLIP, dual_clip=1.0)


# ---- KL


def elbo_output(shift: float = 0.0) -> PolicyOutput:
    return PolicyOutput(normal(2, 3) + shift, normal(2, 3, 4, 5, seed=1) + shift)


def trajectory_output(shift: float = 0.0) -> PolicyOutput:
    log_std = 0.1 * normal(2, 3, 4, 5, seed=2) + shift
    return PolicyOutput(normal(2, 3, 4) + shift, normal(2, 3, 4, 5, seed=1) + shift, log_std)


def with_gradient(output: PolicyOutput) -> tuple[PolicyOutput, list[Tensor]]:
    leaves = [each.clone().requires_grad_() for each in (output.log_prob, output.mean)]
    log_std = None if output.log_std is None else output.log_std.clone().requires_grad_()
    return PolicyOutput(leaves[0], leaves[1], log_std), leaves + ([] if log_std is None else [log_std])


@pytest.mark.parametrize("kind", KL_ESTIMATORS)
def test_kl_is_exactly_zero_where_policy_and_reference_agree(kind: str) -> None:
    reference = elbo_output() if kind == "eps" else trajectory_output()
    current, leaves = with_gradient(reference)
    penalty = kl_penalty(kind, current, reference)
    gradients = torch.autograd.grad(penalty, leaves, allow_unused=True)
    assert penalty.item() == 0 and penalty.dim() == 0
    used = [each for each in gradients if each is not None]
    assert used and all(bool((each == 0).all()) for each in used)


@pytest.mark.parametrize("kind", KL_ESTIMATORS)
@pytest.mark.parametrize("shift", [-0.1, 0.1])
def test_kl_is_positive_and_pulls_back(kind: str, shift: float) -> None:
    output = elbo_output if kind == "eps" else trajectory_output
    current, leaves = with_gradient(output(shift))
    penalty = kl_penalty(kind, current, output())
    pulled = leaves[0] if kind in ("k2", "k3") else leaves[1]
    (gradient,) = torch.autograd.grad(penalty, pulled)
    assert penalty.item() > 0
    assert bool((gradient * shift > 0).all())  # descent moves against the shift


def test_kl_by_hand() -> None:
    log_prob, eps = torch.tensor([[0.0, -1.0]]), torch.zeros(1, 2, 1, 3)
    current, reference = PolicyOutput(log_prob, eps), PolicyOutput(log_prob + 0.5, eps + 2)
    assert kl_penalty("k2", current, reference).item() == pytest.approx(0.125)
    assert kl_penalty("k3", current, reference).item() == pytest.approx(math.exp(0.5) - 1.5)
    assert kl_penalty("eps", current, reference).item() == pytest.approx(12)  # three channels of 2^2
    far = PolicyOutput(log_prob + 100, eps)
    assert kl_penalty("k3", current, far).item() == pytest.approx(math.exp(20) - 21, rel=1e-6)


def test_exact_kl_is_the_closed_form_with_its_gradient() -> None:
    current, leaves = with_gradient(trajectory_output(0.3))
    reference = trajectory_output()
    assert current.log_std is not None and reference.log_std is not None
    closed = kl_divergence(
        Normal(current.mean, current.log_std.exp()), Normal(reference.mean, reference.log_std.exp())
    ).sum(-1)
    found = kl_penalty("exact", current, reference)
    torch.testing.assert_close(found, closed.mean())
    for ours, theirs in zip(
        torch.autograd.grad(found, leaves[1:]), torch.autograd.grad(closed.mean(), leaves[1:]), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_mean_k3_is_the_closed_form() -> None:
    """Actions of the current policy: the mean of k3 is KL(current || reference), not the other direction."""
    draws = 200_000
    policy, other = Normal(0.3, 0.8), Normal(0.0, 1.0)
    actions = 0.3 + 0.8 * normal(1, draws, 1)
    empty = torch.zeros(1, draws, 1, 1)
    current = PolicyOutput(policy.log_prob(actions), empty, empty)
    reference = PolicyOutput(other.log_prob(actions), empty, empty)
    closed = kl_divergence(policy, other).item()  # 0.0881; the other direction is 0.1284
    assert kl_penalty("k3", current, reference).item() == pytest.approx(closed, abs=0.002)


def test_kl_refuses() -> None:
    elbo, trajectory = elbo_output(), trajectory_output()
    with pytest.raises(ValueError, match="k2, k3, eps, exact, got 'k1'"):
        kl_penalty("k1", elbo, elbo)
    with pytest.raises(ValueError, match="'exact' needs log_std"):
        kl_penalty("exact", elbo, elbo)
    with pytest.raises(ValueError, match="'eps' compares predicted noises"):
        kl_penalty("eps", trajectory, trajectory)
    with pytest.raises(ValueError, match=r"log_prob.*\[2, 3\].*\[2, 3, 4\]"):
        kl_penalty("k3", elbo, trajectory)
    with pytest.raises(ValueError, match="mean has a gradient"):
        kl_penalty("eps", elbo, with_gradient(elbo)[0])
