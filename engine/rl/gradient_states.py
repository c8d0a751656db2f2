"""Where the gradient of a reward is taken: images with hidden tokens, noise on these, and how much.

    real     the latents of training images, a random order, any share of hidden tokens alike
    rollout  tokens and order of the model's own short rollouts, hidden as before one of the sampler's iterations

Hidden tokens are noised to one level per image, uniform in t_min ... t_max; a second level for each token is uniform
over all levels, for the anchor. A rollout's token with fresh noise has the distribution of its reverse process on the
way, as far as the head has learned that; what is known around it is what the sampler would really see there. Real
images are what the sampler should see and does not: cheaper by the whole rollout, and biased by that.

Everything is drawn from a generator of the pass, so that a stopped run goes on as it would have.

Shape letters: B images, L image tokens, C token channels, m hidden tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.data.inputs import StepInputs
from engine.sample.generate import ImageConditions
from engine.sample.pipeline import StructMARPipeline
from engine.train.parallel import unsharded
from models.config import NUM_TRAIN_STEPS
from models.masking import mask_from_orders, sample_num_masked, sample_orders
from models.policy.base import draw_iterations
from models.policy.clean import NoisyState
from models.sampling.config import SamplingConfig
from models.structmar import StructMAR
from util.rng import generator


class StateSource(Protocol):
    """One of the two ways."""

    def draw(self, model: StructMAR, inputs: StepInputs, key: Sequence[int]) -> NoisyState:
        """States of as many images as there are inputs, on their device. key: step, pass and rank."""


@dataclass(frozen=True)
class NoiseLevels:
    """The levels that a reward sees, t_min <= t_max, both inclusive, in 0 ... 999. Raises ValueError on others."""

    t_min: int = 200
    t_max: int = 850

    def __post_init__(self) -> None:
        if not 0 <= self.t_min <= self.t_max < NUM_TRAIN_STEPS:
            raise ValueError(
                f"noise levels of a reward must be 0 <= t_min <= t_max < {NUM_TRAIN_STEPS}, "
                f"got t_min {self.t_min} and t_max {self.t_max}"
            )

    def noisy(
        self, tokens: Tensor, orders: Tensor, num_masked: int, grid: tuple[int, int], inputs: StepInputs,
        draws: torch.Generator,
    ) -> NoisyState:  # fmt: skip
        """tokens: [B, L, C]; orders: [B, L], whose first `num_masked` are hidden. draws: on the CPU."""
        mask = mask_from_orders(orders.to(tokens.device), num_masked)
        shape = (len(tokens), num_masked, tokens.shape[2])
        timesteps = torch.randint(self.t_min, self.t_max + 1, shape[:1], generator=draws)  # [B]
        noise = torch.randn(shape, generator=draws, dtype=tokens.dtype)  # [B, m, C]
        second_timesteps = torch.randint(0, NUM_TRAIN_STEPS, shape[:2], generator=draws)  # [B, m]
        second_noise = torch.randn(shape, generator=draws, dtype=tokens.dtype)  # [B, m, C]
        device = tokens.device
        return NoisyState(
            tokens=tokens,
            kept_ids=mask.kept_ids(),
            token_ids=mask.masked_ids(),
            grid=grid,
            text=inputs.text,
            layout=inputs.layout,
            timesteps=timesteps.to(device),
            noise=noise.to(device),
            second_timesteps=second_timesteps.to(device),
            second_noise=second_noise.to(device),
        )


@dataclass(frozen=True)
class RealStates:
    """See the module's docstring. mask_schedule, mask_ratio_min: of `masking.mask_ratio`."""

    levels: NoiseLevels
    seed: int
    mask_schedule: str = "linear"
    mask_ratio_min: float = 0.7

    def draw(self, model: StructMAR, inputs: StepInputs, key: Sequence[int]) -> NoisyState:
        draws = generator(self.seed, "gradient state", *key)
        grid = model.grid_of(inputs.latents)
        num_tokens = math.prod(model.config.unit_grid(grid))
        num_masked = sample_num_masked(num_tokens, self.mask_ratio_min, draws, self.mask_schedule)
        orders = sample_orders(len(inputs), num_tokens, [draws])  # [B, L]
        return self.levels.noisy(model.patchify(inputs.latents), orders, num_masked, grid, inputs, draws)


@dataclass(frozen=True)
class RolloutStates:
    """See the module's docstring. config: the sampler's options; its order must not look at the model."""

    levels: NoiseLevels
    seed: int
    pipeline: StructMARPipeline
    config: SamplingConfig
    precision: str

    def draw(self, model: StructMAR, inputs: StepInputs, key: Sequence[int]) -> NoisyState:
        draws = generator(self.seed, "gradient state", *key)
        generators = [generator(self.seed, "rollout", *key, image) for image in range(len(inputs))]
        conditions = ImageConditions(inputs.text, inputs.layout)
        with torch.no_grad(), unsharded(model):
            drawn = self.pipeline.sample(conditions, self.config, generators, self.precision)
        counts = self.config.masked_counts(drawn.tokens.shape[1])
        (iteration,) = draw_iterations(counts, 1, draws)
        return self.levels.noisy(drawn.tokens, drawn.orders, counts[iteration], drawn.grid, inputs, draws)
