"""What each objective minimises, against its definition, the others, and the update that it is part of."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from engine.rl.objectives import BestOf, Clipped, Nft, Objective, ScoredPass
from models.policy.base import PolicyOutput, Samples, ScoringNoise
from tests.helpers.rl_world import (
    ESTIMATORS,
    batches,
    gradient_of_update,
    grpo_step,
    model_for,
    recorded_gradients,
    take,
    worker_of,
)

SHAPE = (3, 5, 4, 2)  # n, p, K, C
EMPTY = torch.zeros(3, 0, dtype=torch.int64)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def advantages_of(kind: str) -> Tensor:
    """In [-1, 1]: [n], or [n, p]."""
    return normal(*SHAPE[: {"image": 1, "region": 2}[kind]], seed=3).tanh()


def output(eps: Tensor, noise: Tensor) -> PolicyOutput:
    """As `ElboEstimator` gives it."""
    return PolicyOutput(-(noise - eps).square().sum(-1).mean(-1), eps)


def scored(advantages: Tensor, old: Tensor | None, noise: Tensor) -> ScoredPass:
    samples = Samples(torch.zeros(3, 5, 2), EMPTY, (1, 5), None, None)
    given = ScoringNoise(EMPTY, EMPTY, EMPTY, noise, None, 0)
    return ScoredPass(samples, advantages, given, None if old is None else output(old, noise), None)


def value_and_gradient(objective: Objective, eps: Tensor, given: ScoredPass) -> tuple[Tensor, Tensor]:
    eps = eps.clone().requires_grad_()
    assert given.noise.noise is not None
    loss = objective(output(eps, given.noise.noise), given).value
    (gradient,) = torch.autograd.grad(loss, eps)
    return loss.detach(), gradient


# --- NFT -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("credit", ["image", "region"])
@pytest.mark.parametrize("beta", [0.1, 1.0, 2.5])
def test_nft_is_the_loss_of_its_two_policies(credit: str, beta: float) -> None:
    """[r ||v+ - eps||^2 + (1 - r) ||v- - eps||^2] / b, but for what does not depend on the weights."""
    noise, old, eps = (normal(*SHAPE, seed=seed) for seed in range(3))
    advantages = advantages_of(credit)
    value, gradient = value_and_gradient(Nft(beta), eps, scored(advantages, old, noise))

    eps.requires_grad_()
    share = ((1 + advantages) / 2).view(3, -1, 1)  # [n, 1, 1] or [n, p, 1]
    better, worse = (1 - beta) * old + beta * eps, (1 + beta) * old - beta * eps
    errors = [(each - noise).square().sum(-1) for each in (better, worse)]  # [n, p, K] both
    both = ((share * errors[0] + (1 - share) * errors[1]) / beta).mean()
    (expected,) = torch.autograd.grad(both, eps)
    rest = ((old - noise).square().sum(-1) / beta).mean()
    torch.testing.assert_close(value, both.detach() - rest, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-6)


def test_without_advantages_nft_only_holds_on() -> None:
    noise, old, eps = (normal(*SHAPE, seed=seed) for seed in range(3))
    value, gradient = value_and_gradient(Nft(0.3), eps, scored(torch.zeros(3), old, noise))
    torch.testing.assert_close(value, 0.3 * (eps - old).square().sum(-1).mean())
    torch.testing.assert_close(gradient, 0.3 * 2 * (eps - old) / (3 * 5 * 4))


def test_nft_rests_where_its_docstring_says() -> None:
    noise, old = (normal(*SHAPE, seed=seed) for seed in range(2))
    advantages = advantages_of("region")
    target = old - advantages[..., None, None] * (old - noise) / 0.7
    _, gradient = value_and_gradient(Nft(0.7), target, scored(advantages, old, noise))
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


@pytest.mark.parametrize("credit", ["image", "region"])
def test_the_first_steps_of_nft_and_grpo_are_one(credit: str) -> None:
    """In a real update, at ratio 1 and without KL, whatever b and the clip are."""
    settings = {"kl_coef": 0.0, "credit": credit, "estimator": ESTIMATORS["elbo"]}
    nft, clipped = (gradient_of_update(grpo_step(None, objective=each, **settings)) for each in (Nft(3.0), Clipped()))
    assert nft.keys() == clipped.keys()
    for name, gradient in clipped.items():
        torch.testing.assert_close(nft[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_nft_asks_for_the_old_prediction_only_where_it_is_another() -> None:
    """One inner epoch: no pass for it. Two: the first takes the same step, the second is held back."""
    gradients = []
    for inner_epochs in (1, 2):
        step = grpo_step(None, objective=Nft(), inner_epochs=inner_epochs, kl_coef=0.0)
        calls: list[bool] = []
        step.state.wrapped.register_forward_hook(lambda *_, calls=calls: calls.append(torch.is_grad_enabled()))
        with recorded_gradients(step) as seen:
            values = take(step)
        assert calls == [False] * 2 * (inner_epochs - 1) + [True] * 2 * inner_epochs
        assert (values["old_distance"] > 0) == (inner_epochs == 2)
        gradients.append(seen[0])
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_nft_needs_predicted_noises() -> None:
    with pytest.raises(ValueError, match="compares predicted noises, these outputs have none"):
        Nft()(PolicyOutput(torch.zeros(3, 5)), scored(torch.zeros(3), None, normal(*SHAPE, seed=0)))
    with pytest.raises(ValueError, match="beta must be positive, got 0"):
        Nft(0)


# --- best of N -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["elbo", "exact"])
def test_best_of_is_the_likelihood_of_the_best_images_alone(estimator: str) -> None:
    model = model_for(estimator)
    step = grpo_step(model, estimator, objective=BestOf(), kl_coef=0.0)
    (batch,) = batches()
    rollout = worker_of(step).collect(batch, (0, 0, 0))
    best = torch.tensor([row * 3 + int(group.argmax()) for row, group in enumerate(rollout.grouped_rewards())])
    passes = step.score(cast(Any, rollout), 0, 0)
    for each in passes:
        assert torch.equal(each.samples.tokens, rollout.samples.tokens[best]) and each.old is None
        assert each.samples.layout is not None and rollout.samples.layout is not None
        assert torch.equal(each.samples.layout.boxes_xyxy, rollout.samples.layout.boxes_xyxy[best])
    with torch.no_grad():
        expected = sum(
            float(-each.noise.weight * step.estimator.log_probs(model, each.samples, each.noise).log_prob.mean())
            for each in passes
        )
    loss = sum(each.noise.weight * take_loss(step, each) for each in passes)
    assert loss == pytest.approx(expected, rel=1e-5)


def take_loss(step: Any, scored: ScoredPass) -> float:
    step.rl_backward(scored, 1.0, True)
    return float(step.read()["policy_loss"])


def test_the_first_of_equals_is_best() -> None:
    rewards = torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0]])
    chosen = BestOf().scored_images(rewards)
    assert chosen is not None and chosen.tolist() == [1, 3]
