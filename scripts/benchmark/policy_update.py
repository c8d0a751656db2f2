"""The update of stage 3 after a rollout: log-probabilities of the old and the reference policy, and the inner epochs.

Nothing is sampled: the rollout holds random tokens and rewards, which cost the same. (Rollouts are sampling cases.) The
output that is compared is the old policy's log-probabilities.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from engine.rl.rewards import RewardBatch
from engine.rl.rollout import Rollout, RolloutWorker
from engine.rl.step import GrpoConfig, GrpoStep
from engine.train.optim import build_optimizer
from engine.train.state import Position, TrainState
from models.policy.base import Policy, Samples
from models.policy.elbo import ElboEstimator
from models.weights import select_trainable
from scripts.benchmark.table import OURS, Contender
from scripts.benchmark.world import TRAINED, World
from util.distributed import DistInfo
from util.ema import Ema

LR, EMA_RATE = 1e-6, 0.999


@dataclass(frozen=True)
class UpdateCase:
    """A `Case`."""

    name: str
    model: str
    images: int
    group_size: int
    estimator: ElboEstimator
    inner_epochs: int = 2
    precisions: tuple[str, ...] = ("fp32", "bf16")

    def contenders(self, world: World, _public: ModuleType | None) -> list[Contender]:
        model = copy.deepcopy(world.model)
        trainable = select_trainable(model, "full")
        policy = Policy(model, self.estimator)
        state = TrainState(model, policy, trainable, build_optimizer(trainable, LR, 0.0), Ema(trainable, EMA_RATE))
        return [_contender(self, world, state, precision) for precision in self.precisions]


UPDATE_CASES = (
    UpdateCase(
        "StructMAR mar_mini update, 4 x 4", TRAINED, 16, 4, ElboEstimator(num_iter=16, num_masks=2, num_draws=4)
    ),
    UpdateCase("StructMAR mar_base update, 1 x 2", "mar_base StructMAR", 2, 2, ElboEstimator(64, 1, 2), 1),
)


def _contender(case: UpdateCase, world: World, state: TrainState, precision: str) -> Contender:
    config = GrpoConfig(1, 1, inner_epochs=case.inner_epochs, precision=precision)
    reference, worker = world.model.requires_grad_(False), cast(RolloutWorker, None)  # nothing is sampled
    dist = DistInfo(0, 1, 0, torch.device("cpu"))
    step = GrpoStep(config, state, worker, case.estimator, reference, None, dist)
    rollout = _rollout(world, case.group_size)

    def run() -> Tensor:
        passes = step.score(rollout, 0, 0)
        for inner in range(case.inner_epochs):
            step.optimizer_step(passes, [], 1.0, Position(), inner)
        step.read()
        return torch.zeros(())

    def log_probs() -> Tensor:
        old = [each.old for each in step.score(rollout, 0, 0)]
        return torch.cat([each.log_prob.flatten() for each in old if each is not None])

    return Contender(OURS, precision, run, log_probs)


def _rollout(world: World, group_size: int) -> Rollout:
    generator, shape = torch.Generator().manual_seed(4), (*world.orders.shape, world.model.config.token_dim)
    tokens = torch.randn(shape, generator=generator)  # [n, L, C]
    rewards = RewardBatch(torch.rand(len(world), generator=generator), {}, [], [])
    samples = Samples(tokens, world.orders, world.model.config.grid, world.text, world.layout)
    return Rollout([], samples, [], rewards, group_size)
