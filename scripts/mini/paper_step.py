"""The step of scripts/mini/paper_surrogate.py: GRPO's with the released loss."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from engine.cli.build import PreparedRun
from engine.cli.build_rl import build_rl
from engine.rl.objectives import ScoredPass
from engine.rl.step import GrpoStep
from engine.train.parallel import gradient_sync
from engine.train.state import Position
from models.policy.elbo import ElboEstimator
from util.distributed import DistInfo
from util.rng import generator


def weighted_error(log_prob: Tensor, advantages: Tensor) -> Tensor:
    """Mean of advantage * denoising error. log_prob: [n, p], of ElboEstimator: minus the error; advantages: [n]."""
    return -(advantages[:, None] * log_prob).mean()


class PaperStep(GrpoStep):
    """`GrpoStep` with the released loss. Raises ValueError for settings that this loss does not have."""

    def __init__(self, step: GrpoStep) -> None:
        if not isinstance(step.estimator, ElboEstimator):
            raise ValueError(f"the released loss needs --rl_estimator elbo, got {type(step.estimator).__name__}")
        if step.config.kl_coef != 0 or step.config.rl_step_ratio != 1:
            raise ValueError(
                "the released loss is for --kl_coef 0 and --rl_step_ratio 1, "
                f"got {step.config.kl_coef} and {step.config.rl_step_ratio}"
            )
        super().__init__(step.config, step.state, step.worker, step.estimator, None, None, step.dist, step.observers)
        self.one_mask = replace(step.estimator, num_masks=1)

    def optimizer_step(
        self, passes: Sequence[ScoredPass], batches: Sequence[Any], rl_share: float, position: Position, inner: int
    ) -> None:
        """As in GRPO, but every inner step has noise of its own."""
        fresh = [self._redrawn(each, (position.step, inner, index)) for index, each in enumerate(passes)]
        super().optimizer_step(fresh, batches, rl_share, position, inner)

    def rl_backward(self, scored: ScoredPass, weight: float, is_last: bool) -> None:
        with gradient_sync(self._synced(), is_last):
            current = self._outputs(self.state.wrapped, scored.samples, scored.noise)
            loss = weighted_error(current.log_prob, scored.advantages)
            (weight * loss).backward()
        self._note({"policy_loss": loss, "loss": loss})

    def _redrawn(self, scored: ScoredPass, key: Sequence[int]) -> ScoredPass:
        rng = generator(self.config.seed, "released loss", *key, self.dist.rank)
        (fresh,) = self.one_mask.draw_noise(scored.samples, rng)
        return replace(scored, noise=fresh)


def build(args: argparse.Namespace, dist: DistInfo) -> PreparedRun:
    """main_rl.py's stage 3 with a `PaperStep`."""
    prepared = build_rl(args, dist)
    assert isinstance(prepared.run.step, GrpoStep)
    return replace(prepared, run=replace(prepared.run, step=PaperStep(prepared.run.step)))
