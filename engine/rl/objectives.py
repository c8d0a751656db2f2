"""The losses that an update of stage 3 minimises on its rollouts, one object each.

Of a scored token with noise eps, the network's prediction eps_theta, the one of the policy that sampled o, e = o - eps
and d = eps_theta - o; A is the advantage, sums are over channels, means over tokens and draws:

    Clipped  -min(rho A, clip(rho) A)                 GRPO's (engine/rl/grpo.py), of any estimator
    Nft      2 A e.d + b ||d||^2                      of the denoising error (`ElboEstimator`)
    BestOf   -log pi                                  on each group's best image, of whatever scores finished tokens

At d = 0, the first step on every rollout, the gradient of `Nft` is that of `Clipped` without its clip. They differ
further away, where the ratio ends and the parabola turns. `Nft` is the forward-process objective of DiffusionNFT
(arXiv:2509.16117) with v+ = (1 - b) o + b eps_theta, v- = (1 + b) o - b eps_theta and r = (1 + A) / 2 multiplied out:

    [r ||v+ - eps||^2 + (1 - r) ||v- - eps||^2] / b = 2 A e.d + b ||d||^2 + ||e||^2 / b.

E[A e | x_t] = -Cov(A, eps | x_t) + E[A | x_t] (o - E[eps | x_t]): the second term is 0 only where o is the denoiser of
the samples. It is not where they were drawn with guidance or another temperature.

To each the step adds kl_coef times the distance from the start of the stage (`kl_penalty`); with the estimator `eps`
that is NFT's gamma ||eps_theta - eps_start||^2.

Left out: the division of NFT's errors by their mean size, and negatives of best-of-N.

Shape letters: B prompts, G samples per prompt, n images, p tokens scored in a pass, K draws per token, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.rl.grpo import clipped_surrogate
from models.policy.base import PolicyOutput, Samples, ScoringNoise


@dataclass(frozen=True)
class ScoredPass:
    """One pass of the backbone over a rollout, and what was found there before the update.

    advantages: [n], or [n, p] where each token has its own. old: of the policy that sampled; None where the objective
    does without.
    """

    samples: Samples
    advantages: Tensor
    noise: ScoringNoise
    old: PolicyOutput | None
    reference: PolicyOutput | None


@dataclass(frozen=True)
class Loss:
    """value: a scalar with a gradient, a mean over the pass. stats: detached scalars, by the name they are logged
    under."""

    value: Tensor
    stats: dict[str, Tensor]


class Objective(Protocol):
    """Of one pass: current is what the weights predict now, with a gradient."""

    def needs_old(self, inner_epochs: int) -> bool:
        """Whether the old policy's outputs are computed before an update of so many optimizer steps."""

    def scored_images(self, rewards: Tensor) -> Tensor | None:
        """rewards: [B, G] -> the images that are scored, [m] of b * G + g; None: all."""

    def __call__(self, current: PolicyOutput, scored: ScoredPass) -> Loss: ...


@dataclass(frozen=True)
class Clipped:
    """PPO's clipped ratio of the policy to the one that sampled, see `clipped_surrogate`."""

    clip_range: float = 0.05
    dual_clip: float | None = 3.0

    def needs_old(self, inner_epochs: int) -> bool:
        return True

    def scored_images(self, rewards: Tensor) -> Tensor | None:
        return None

    def __call__(self, current: PolicyOutput, scored: ScoredPass) -> Loss:
        assert scored.old is not None, "a ratio needs the old policy"
        surrogate = clipped_surrogate(
            current.log_prob, scored.old.log_prob, scored.advantages, self.clip_range, self.dual_clip
        )
        return Loss(surrogate.loss, surrogate.stats)


@dataclass(frozen=True)
class Nft:
    """See the module's docstring. beta: b, the strength of the parabola that keeps the prediction near the old one; its
    minimum lies at d = -A e / b. Advantages enter as they are: halving them and b halves the loss.

    stats: old_distance, the mean of ||d||^2. Raises ValueError if beta is not positive.
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}")

    def needs_old(self, inner_epochs: int) -> bool:
        """With one step on every rollout the old prediction is the current one."""
        return inner_epochs > 1

    def scored_images(self, rewards: Tensor) -> Tensor | None:
        return None

    def __call__(self, current: PolicyOutput, scored: ScoredPass) -> Loss:
        """Raises ValueError for outputs without predicted noises."""
        eps, noise = current.mean, scored.noise.noise  # [n, p, K, C] both
        if eps is None or noise is None:
            raise ValueError("the objective nft compares predicted noises, these outputs have none")
        old = eps.detach() if scored.old is None else scored.old.mean  # [n, p, K, C]
        assert old is not None
        step = eps - old  # [n, p, K, C]
        advantage = scored.advantages.view(len(eps), -1, 1)  # [n, 1, 1] or [n, p, 1]
        linear = 2 * advantage * ((old - noise) * step).sum(-1)  # [n, p, K]
        distance = step.square().sum(-1)  # [n, p, K]
        return Loss((linear + self.beta * distance).mean(), {"old_distance": distance.detach().mean()})


@dataclass(frozen=True)
class BestOf:
    """Fine-tuning on the best image of each group (RAFT, Dong et al. 2023, arXiv:2304.06767); the first of equals. Of
    samples drawn with guidance it teaches to draw so without."""

    def needs_old(self, inner_epochs: int) -> bool:
        return False

    def scored_images(self, rewards: Tensor) -> Tensor | None:
        starts = torch.arange(rewards.shape[0], device=rewards.device) * rewards.shape[1]  # [B]
        return starts + rewards.argmax(1)  # [B]

    def __call__(self, current: PolicyOutput, scored: ScoredPass) -> Loss:
        return Loss(-current.log_prob.mean(), {})
