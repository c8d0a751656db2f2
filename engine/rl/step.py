"""One update of stage 3: roll out, score, and take `inner_epochs` optimizer steps on an objective.

    1. Every prompt of this step's batches is sampled G times and rewarded (engine/rl/rollout.py); advantages per group,
       of images or, by region, of tokens (engine/rl/credit.py).
    2. Everything random about the log-probabilities is drawn once. The reference's and, where the objective needs them
       (engine/rl/objectives.py), the old ones are computed at this noise, without gradients, in the same passes in
       which the current ones will be.
    3. Per inner epoch: one forward and backward pass per mask of every rollout, then one clip, one AdamW step and one
       EMA update. In the first inner epoch every ratio is exactly 1 and, in the first update of all, the KL exactly 0.

With rho = rl_step_ratio below 1, `mix` "loss" minimises rho * L_RL + (1 - rho) * L_SFT, where L_SFT is stage 2's loss
on the images of the same prompts; "step" takes a step of one kind or the other, by a coin that all processes share. At
rho = 1 no image is read; at rho = 0 nothing is sampled.

Every process does the same number of backward passes: groups of equal rewards keep their zero advantages. A step whose
gradient is not finite on one process is left out on all. Dropout is off but in the forward pass of L_SFT.

Left out: weights of old policies (their outputs are enough), value functions, filtering of groups.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from engine.data.inputs import MakeInputs
from engine.rl.cost import describe_time_left
from engine.rl.credit import region_advantages
from engine.rl.grpo import group_advantages, kl_penalty, zero_std_share
from engine.rl.objectives import Clipped, Objective, ScoredPass
from engine.rl.rollout import Rollout, RolloutObserver, RolloutWorker
from engine.rl.update import OptimizerUpdate, StepNotes
from engine.train.parallel import gradient_sync
from engine.train.state import Position, TrainState
from models.policy.base import Estimator, LossInputs, Policy, PolicyOutput, Samples, ScoringNoise
from models.structmar import StructMAR
from util.distributed import DistInfo, reduce_mean
from util.rng import derive_seed, generator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GrpoConfig:
    """objective: the loss on the rollouts. credit: whose advantages are, of CREDITS; by region, adv_norm "batch" and
    rewards of quality have no meaning. adv_clip bounds advantages (grpo.py). total_updates: the run's."""

    seed: int
    total_updates: int
    objective: Objective = field(default_factory=Clipped)
    inner_epochs: int = 2
    kl_coef: float = 0.02
    kl_estimator: str = "k3"
    credit: str = "image"
    adv_norm: str = "zscore"
    adv_clip: float = 5.0
    rl_step_ratio: float = 1.0
    mix: str = "loss"
    grad_clip: float = 1.0
    precision: str = "fp32"
    mask_ratio_min: float = 0.7
    mask_schedule: str | None = None


class GrpoStep:
    """A `Step` of engine/train/loop.py. reference: the frozen policy of the KL; None without one (kl_coef 0).

    make_inputs: for L_SFT; None where rl_step_ratio is 1. observers: are handed the rollouts of every update.
    """

    shown = ("reward", "reward_std", "loss", "grad_norm")

    def __init__(
        self,
        config: GrpoConfig,
        state: TrainState,
        worker: RolloutWorker,
        estimator: Estimator,
        reference: StructMAR | None,
        make_inputs: MakeInputs | None,
        dist: DistInfo,
        observers: Sequence[RolloutObserver] = (),
    ) -> None:
        assert (reference is None) == (config.kl_coef == 0), "a reference belongs to a KL"
        assert (make_inputs is None) == (config.rl_step_ratio == 1), "images belong to the SFT part"
        self.config, self.state, self.worker, self.estimator, self.dist = config, state, worker, estimator, dist
        self.reference = None if reference is None else Policy(reference.eval(), estimator)
        self.make_inputs, self.observers = make_inputs, observers
        self.update = OptimizerUpdate(state, config.grad_clip, dist)
        self.notes = StepNotes(self.shown)
        self.is_first = True

    # --- a Step ----------------------------------------------------------------------------------------------------

    def take(self, position: Position, micro_batches: Iterator[Any]) -> int:
        self.notes.begin()
        batches, step = list(micro_batches), position.step
        rl_share = self._rl_share(step)
        started = time.perf_counter()
        rollouts = []
        if rl_share > 0:
            rollouts = [self.worker.collect(batch, (step, k, self.dist.rank)) for k, batch in enumerate(batches)]
            self._note_rollouts(rollouts)
        rolled_out = time.perf_counter()
        passes = [each for k, rollout in enumerate(rollouts) for each in self.score(rollout, step, k)]
        for inner in range(self.config.inner_epochs if rollouts else 1):
            self.optimizer_step(passes, batches if rl_share < 1 else [], rl_share, position, inner)
        finished = time.perf_counter()
        self._note({"rollout_seconds": rolled_out - started, "update_seconds": finished - rolled_out})
        updates_left = self.config.total_updates - step - 1
        if self.is_first and updates_left > 0:
            logger.info("%s", describe_time_left(finished - started, updates_left))
        self.is_first = False
        self.notes.keep()
        if rollouts:
            self._show(rollouts)
        return sum(map(len, rollouts)) or sum(map(len, batches))

    def check(self) -> None:
        """Steps that are not finite are left out as they happen: there is nothing to find later."""

    def read(self) -> dict[str, float]:
        return self.notes.read()

    def open_interval(self) -> dict[str, Any]:
        return self.notes.state()

    def reopen(self, interval: Mapping[str, Any]) -> None:
        self.notes.restore(interval)

    # --- the update ------------------------------------------------------------------------------------------------

    def score(self, rollout: Rollout, step: int, micro: int) -> list[ScoredPass]:
        """Draws the passes of a rollout and computes what does not change in the update."""
        objective, samples = self.config.objective, rollout.samples
        advantages = self._advantages(rollout).to(self.dist.device)  # [n] or [n, L]
        self._note({"advantage_abs": advantages.abs().mean()})
        chosen = objective.scored_images(rollout.grouped_rewards())
        if chosen is not None:
            samples, advantages = samples.rows(chosen.to(self.dist.device)), advantages[chosen.to(self.dist.device)]
        noise_of_passes = self.estimator.draw_noise(
            samples, generator(self.config.seed, "estimator", step, micro, self.dist.rank)
        )
        self.state.model.eval()
        with torch.no_grad():
            return [self._scored(samples, advantages, noise) for noise in noise_of_passes]

    def _scored(self, samples: Samples, advantages: Tensor, noise: ScoringNoise) -> ScoredPass:
        """advantages: [n] or [n, L]."""
        old = reference = None
        if self.config.objective.needs_old(self.config.inner_epochs):
            old = self._outputs(self.state.wrapped, samples, noise)
            old = replace(old, code_log_probs=None)  # large, and the reference's alone is needed
            self._note_replay(samples, noise, old)
        if self.reference is not None:
            reference = self._outputs(self.reference, samples, noise)
        own = advantages if advantages.dim() == 1 else advantages.gather(1, noise.token_ids)  # [n] or [n, p]
        return ScoredPass(samples, own, noise, old, reference)

    def optimizer_step(
        self, passes: Sequence[ScoredPass], batches: Sequence[Any], rl_share: float, position: Position, inner: int
    ) -> None:
        """One step on the passes (weight rl_share) and the batches' own images (the rest)."""
        num_terms = len(passes) + len(batches)
        for index, each in enumerate(passes):
            weight = rl_share * each.noise.weight / len(passes)
            self.rl_backward(each, weight, is_last=index + 1 == num_terms)
        for index, batch in enumerate(batches):
            key = (position.step, inner, index, self.dist.rank)
            is_last = len(passes) + index + 1 == num_terms
            self.sft_backward(batch, (1 - rl_share) / len(batches), position.epoch, key, is_last)
        self._note(self.update(position.step))

    def rl_backward(self, scored: ScoredPass, weight: float, is_last: bool) -> None:
        """Adds weight * (the objective + kl_coef * KL) of one pass to the gradients."""
        config = self.config
        with gradient_sync(self._synced(), is_last):
            current = self._outputs(self.state.wrapped, scored.samples, scored.noise)
            of_rollout = config.objective(current, scored)
            loss = of_rollout.value
            values: dict[str, Tensor | float] = {**of_rollout.stats, "policy_loss": loss}
            if scored.reference is not None:
                kl = kl_penalty(config.kl_estimator, current, scored.reference)
                values["kl"] = kl
                loss = loss + config.kl_coef * kl
            (weight * loss).backward()
        self._note({**values, "loss": loss})

    def sft_backward(self, batch: Any, weight: float, epoch: int, key: Sequence[int], is_last: bool) -> None:
        """Adds weight * L_SFT, stage 2's loss on the batch's images, to the gradients."""
        assert self.make_inputs is not None
        model, seed = self.state.model, self.config.seed
        rng = generator(seed, "sft", *key)
        inputs = self.make_inputs(batch, epoch, rng)
        ratio_min, schedule = self.config.mask_ratio_min, self.config.mask_schedule
        noise = model.sample_training_noise(len(inputs), rng, ratio_min, model.grid_of(inputs.latents), schedule)
        torch.manual_seed(derive_seed(seed, "sft dropout", *key))
        device = self.dist.device
        model.train()
        with gradient_sync(self._synced(), is_last):
            with self._autocast():
                given = (inputs.labels, inputs.text, inputs.layout, inputs.sizes)
                loss = self.state.wrapped(LossInputs(inputs.latents, noise.to(device), *given))
            (weight * loss).backward()
        model.eval()
        self._note({"sft_loss": loss})

    # --- parts -----------------------------------------------------------------------------------------------------

    def _rl_share(self, step: int) -> float:
        """The weight of L_RL in this step."""
        ratio = self.config.rl_step_ratio
        if self.config.mix == "loss" or ratio in (0, 1):
            return ratio
        coin = torch.rand((), generator=generator(self.config.seed, "mix", step))  # the same on every process
        return float(coin < ratio)

    def _outputs(self, policy: nn.Module, samples: Samples, noise: ScoringNoise) -> PolicyOutput:
        with self._autocast():
            output: PolicyOutput = policy(samples, noise)
        return output

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.dist.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _synced(self) -> nn.Module:
        """Whose gradients are exchanged: the sharded model's, or those of DDP around the policy."""
        return self.state.model if isinstance(self.state.model, FSDPModule) else self.state.wrapped

    def _advantages(self, rollout: Rollout) -> Tensor:
        """Of images, [n], or of their tokens, [n, L]."""
        config, samples, rewards = self.config, rollout.samples, rollout.grouped_rewards()  # [B, G]
        if config.credit == "region":
            assert samples.layout is not None, "stage 3 has layouts"
            way = (rollout.rewards.regions, samples.layout.to("cpu"), samples.grid, rollout.group_size)
            return region_advantages(*way, config.adv_norm, config.adv_clip)
        batch_std = None
        if config.adv_norm == "batch":
            centred = rewards - rewards.mean(1, keepdim=True)  # [B, G]
            batch_std = math.sqrt(reduce_mean({"variance": float(centred.square().mean())})["variance"])
        return group_advantages(rewards, config.adv_norm, batch_std, config.adv_clip).flatten()

    # --- what is logged --------------------------------------------------------------------------------------------

    def _note(self, values: Mapping[str, Tensor | float]) -> None:
        self.notes.note(values)

    def _note_rollouts(self, rollouts: Sequence[Rollout]) -> None:
        totals = torch.cat([rollout.rewards.total for rollout in rollouts])  # [n of all]
        self._note({"reward": totals.mean(), "reward_std": totals.std(correction=0)})
        for name in rollouts[0].rewards.parts:
            part = torch.cat([rollout.rewards.parts[name] for rollout in rollouts])  # [n of all]
            self._note({f"reward/{name}": part.mean(), f"reward/{name}_std": part.std(correction=0)})
        for rollout in rollouts:
            rewards = rollout.grouped_rewards()
            self._note({"zero_std_share": zero_std_share(rewards), "token_std": rollout.samples.tokens.std()})
            self._note({"group_std": rewards.std(1, correction=0).mean()})

    def _show(self, rollouts: Sequence[Rollout]) -> None:
        """To the observers, once the step is whole: a step that fails is taken again."""
        totals = torch.cat([rollout.rewards.total for rollout in rollouts])  # [n of all]
        mean_reward = reduce_mean({"reward": float(totals.mean())})["reward"]
        for observer in self.observers:
            observer(rollouts, mean_reward)

    def _note_replay(self, samples: Samples, noise: ScoringNoise, old: PolicyOutput) -> None:
        """How far the old log-probabilities are from those recorded while sampling: a mismatch would show here."""
        gap = self.estimator.replay_gap(samples, noise, old.log_prob)
        if gap is not None:
            self._note({"replay_gap": gap})
