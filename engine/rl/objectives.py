"""The losses that an update of stage 3 minimises on its rollouts, one object each.

`Clipped` is GRPO's (engine/rl/grpo.py). To each the step adds kl_coef times the distance from the start of the stage.

Shape letters: n images, p tokens scored in a pass, K draws per token, C token channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from engine.rl.grpo import clipped_surrogate
from models.policy.base import PolicyOutput, Samples, ScoringNoise


@dataclass(frozen=True)
class ScoredPass:
    """One pass of the backbone over a rollout, and what was found there before the update. advantages: [n]."""

    samples: Samples
    advantages: Tensor
    noise: ScoringNoise
    old: PolicyOutput
    reference: PolicyOutput | None


@dataclass(frozen=True)
class Loss:
    """value: a scalar with a gradient, a mean over the pass. stats: detached scalars, by the name they are logged
    under."""

    value: Tensor
    stats: dict[str, Tensor]


class Objective(Protocol):
    """Of one pass: current is what the weights predict now, with a gradient."""

    def __call__(self, current: PolicyOutput, scored: ScoredPass) -> Loss: ...


@dataclass(frozen=True)
class Clipped:
    """PPO's clipped ratio of the policy to the one that sampled, see `clipped_surrogate`."""

    clip_range: float = 0.05
    dual_clip: float | None = 3.0

    def __call__(self, current: PolicyOutput, scored: ScoredPass) -> Loss:
        surrogate = clipped_surrogate(
            current.log_prob, scored.old.log_prob, scored.advantages, self.clip_range, self.dual_clip
        )
        return Loss(surrogate.loss, surrogate.stats)
