"""The paper's released surrogate, a row of the comparison: its loss, its draws, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.rl.objectives import ScoredPass
from engine.rl.step import GrpoConfig, GrpoStep
from engine.train.state import TrainState
from models.policy.base import PolicyOutput, Samples, ScoringNoise
from models.policy.elbo import ElboEstimator
from models.policy.trajectory import TrajectoryEstimator
from models.sampling.config import SamplingConfig
from scripts.mini.paper_step import PaperStep
from util.distributed import DistInfo

ADVANTAGES = torch.tensor([1.0, -2.0])


class OneWeight(torch.nn.Module):
    """A policy whose denoising error is its weight, once for the first image and three times for the second."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(5.0))

    def forward(self, samples: Samples, draws: ScoringNoise) -> PolicyOutput:
        error = self.weight * torch.tensor([[1.0, 1.0], [3.0, 3.0]])
        return PolicyOutput(-error, error)


def grpo_step(policy: torch.nn.Module, estimator: Any, **changes: Any) -> GrpoStep:
    config = GrpoConfig(seed=1, total_updates=1, **({"kl_coef": 0.0} | changes))
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    state: Any = TrainState(policy, policy, dict(policy.named_parameters()), optimizer, None)  # type: ignore[arg-type]
    worker: Any = None
    return GrpoStep(config, state, worker, estimator, None, None, DistInfo(0, 1, 0, torch.device("cpu")))


def scored() -> ScoredPass:
    orders = torch.stack([torch.arange(16), torch.arange(15, -1, -1)])
    samples = Samples(torch.zeros(2, 16, 4), orders, (4, 4), None, None)
    empty = torch.zeros(2, 0, dtype=torch.int64)
    return ScoredPass(
        samples, ADVANTAGES, ScoringNoise(empty, empty, empty, None, None, 0), PolicyOutput(empty, empty), None
    )


def test_the_released_loss_by_hand() -> None:
    """advantage * error: (1 * w + -2 * 3 w) / 2 = -2.5 w, so the second image's error grows without bound."""
    policy = OneWeight()
    step = PaperStep(grpo_step(policy, ElboEstimator(4, 2, 2)))
    step.rl_backward(scored(), weight=0.5, is_last=True)
    assert policy.weight.grad == pytest.approx(0.5 * -2.5)
    assert step.read()["policy_loss"] == pytest.approx(-2.5 * 5)


def test_every_inner_step_has_draws_of_its_own() -> None:
    step = PaperStep(grpo_step(OneWeight(), ElboEstimator(4, 2, 2)))
    noises = [step._redrawn(scored(), (0, inner, 0)).noise.noise for inner in (0, 1, 0)]
    assert all(noise is not None for noise in noises)
    assert torch.equal(noises[0], noises[2])  # type: ignore[arg-type]
    assert noises[0].shape != noises[1].shape or not torch.equal(noises[0], noises[1])  # type: ignore[union-attr,arg-type]


def test_the_released_loss_has_no_other_estimator_and_no_kl() -> None:
    with pytest.raises(ValueError, match="needs --rl_estimator elbo, got TrajectoryEstimator"):
        PaperStep(grpo_step(OneWeight(), TrajectoryEstimator(SamplingConfig(num_iter=4, num_sampling_steps=10), 2)))
    step = grpo_step(OneWeight(), ElboEstimator(4, 2, 2))
    step.config = GrpoConfig(seed=1, total_updates=1, kl_coef=0.02)
    with pytest.raises(ValueError, match=r"--kl_coef 0 and --rl_step_ratio 1, got 0.02 and 1.0"):
        PaperStep(step)
