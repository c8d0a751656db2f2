"""Log-probabilities of recorded reverse steps x_t -> x_{t-1}, which are Gaussian:

    l_t = log N(x_{t-1}; mu_theta(x_t, t, z), (temperature * sigma_theta)^2).

Left out: several reverse processes per token.

Shape letters: n images, L image tokens, C token channels, p tokens scored in one pass of the backbone, K reverse steps
scored per token, S reverse steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from models.heads.diffusion import ReverseStep, normal_log_prob, reverse_steps
from models.heads.diffusion_sampler import Trace
from models.policy.base import PolicyOutput, Samples, ScoringNoise, check_masks, draw_iterations
from models.sampling.config import SamplingConfig, guidance_scales
from models.sampling.guidance import choose_branches, combine_branches
from models.sampling.orders import iteration_ids
from models.structmar import StructMAR


@dataclass(frozen=True)
class TrajectoryEstimator:
    """Scores recorded reverse steps of the tokens unmasked in `num_masks` iterations: exact log-probabilities, one per
    (token, step), in float32.

    config: the rollout's. num_draws: how many of the allowed steps a pass scores (None: all). skipped: steps left out
    at either end, at least 1. The last step draws nothing; the step before it and the first two turn a small change of
    eps into a huge one of the log-probability (at 100 steps the first one's KL is a million times the median step's)
    and have next to no say in the outcome: about 0.2 % of the gradient in one dimension.

    What to know: the policy is the guided one. Only the fully conditioned branch gets a gradient; the others are
    computed without. The variance is the full branch's, as in the sampler. With guidance of 1 there is one branch.
    """

    config: SamplingConfig
    num_masks: int = 16
    num_draws: int | None = None
    skipped: int = 2

    def __post_init__(self) -> None:
        check_masks(self.num_masks, self.config.num_iter)
        self.config.require_traceable()
        if self.skipped < 1:
            raise ValueError(f"skipped must be at least 1 (the last step draws nothing), got {self.skipped}")
        allowed = len(self.allowed_steps)
        if allowed < 1:
            raise ValueError(
                f"no reverse step is left: {len(self.reverse_steps)} steps, {self.skipped} skipped at either end"
            )
        if self.num_draws is not None and not 1 <= self.num_draws <= allowed:
            raise ValueError(f"num_draws must lie between 1 and the {allowed} allowed steps, got {self.num_draws}")

    @property
    def head(self) -> str:
        return "diffusion"

    @property
    def needs_trace(self) -> bool:
        return True

    @property
    def reverse_steps(self) -> tuple[ReverseStep, ...]:
        return reverse_steps(self.config.num_sampling_steps, self.config.t_max)

    @property
    def allowed_steps(self) -> range:
        """Indices into `reverse_steps` that may be scored."""
        return range(self.skipped, len(self.reverse_steps) - self.skipped)

    def draw_noise(self, samples: Samples, generator: torch.Generator) -> list[ScoringNoise]:
        """See `Estimator`. All images and tokens of a pass share its reverse steps."""
        counts = self.config.masked_counts(samples.orders.shape[1])
        iterations = draw_iterations(counts, self.num_masks, generator)
        return [self._draw_pass(samples, counts, iteration, generator) for iteration in iterations]

    def _draw_pass(
        self, samples: Samples, counts: Sequence[int], iteration: int, generator: torch.Generator
    ) -> ScoringNoise:
        steps = tuple(self.allowed_steps)
        if self.num_draws is not None:
            chosen = torch.randperm(len(steps), generator=generator, device=generator.device)[: self.num_draws]
            steps = tuple(steps[index] for index in sorted(chosen.tolist()))
        kept_ids, token_ids = iteration_ids(samples.orders, counts, iteration)  # [n, L - m], [n, p]
        told = torch.tensor([self.reverse_steps[step].timestep for step in steps], device=samples.tokens.device)  # [K]
        return ScoringNoise(kept_ids, token_ids, told.expand(*token_ids.shape, -1), None, steps, iteration)

    def log_probs(self, model: StructMAR, samples: Samples, noise: ScoringNoise) -> PolicyOutput:
        """One pass: log_prob [n, p, K], mean and log_std (of the next state) [n, p, K, C]."""
        if not isinstance(samples.trace, Trace):
            raise ValueError("the samples have no trace of a diffusion head: record them (sample(..., record=True))")
        if noise.steps is None:
            raise ValueError("this noise is another estimator's: it has no reverse steps")
        assert not model.training, "log-probabilities need model.eval()"
        states = samples.trace.states  # [n, L, S + 1, C]
        at = noise.token_ids[..., None, None].expand(-1, -1, *states.shape[2:])  # [n, p, S + 1, C]
        states = states.gather(1, at)  # [n, p, S + 1, C]
        before = torch.stack([states[:, :, step] for step in noise.steps], dim=2)  # [n, p, K, C]
        after = torch.stack([states[:, :, step + 1] for step in noise.steps], dim=2)  # [n, p, K, C]
        eps, fraction = self._predict(model, samples, noise, before)  # each [n, p, K, C]
        steps = [self.reverse_steps[step] for step in noise.steps]
        parts = [
            step.distribution(before[:, :, k], eps[:, :, k], fraction[:, :, k], self.config.clip_x0)
            for k, step in enumerate(steps)
        ]  # K pairs of [n, p, C]
        mean = torch.stack([part[0] for part in parts], dim=2)  # [n, p, K, C]
        log_variance = torch.stack([part[1] for part in parts], dim=2)  # [n, p, K, C]
        log_std = 0.5 * log_variance + math.log(self.config.temperature)  # [n, p, K, C]
        return PolicyOutput(normal_log_prob(after, mean, log_std), mean, log_std)

    def replay_gap(self, samples: Samples, noise: ScoringNoise, log_prob: Tensor) -> Tensor | None:
        """See `Estimator`."""
        if not isinstance(samples.trace, Trace) or noise.steps is None:
            return None
        rows = noise.token_ids[..., None].expand(-1, -1, samples.trace.log_probs.shape[-1])  # [n, p, S]
        recorded = samples.trace.log_probs.gather(1, rows)[..., list(noise.steps)]  # [n, p, K]
        return (recorded - log_prob).abs().max()

    def _predict(self, model: StructMAR, samples: Samples, noise: ScoringNoise, noisy: Tensor) -> tuple[Tensor, Tensor]:
        """The guided eps and the full branch's variance fraction, each [n, p, K, C] float32."""
        num_tokens = samples.orders.shape[1]
        names, config = choose_branches(self.config, samples.text is not None, samples.layout is not None)
        if config.branch_uses(len(names))[noise.iteration] == "full only":
            names = ("full",)
        next_masked = config.masked_counts(num_tokens)[noise.iteration + 1]
        eps, fractions = {}, {}
        for name in names:
            with nullcontext() if name == "full" else torch.no_grad():
                output = model.denoise(
                    samples.tokens,
                    noise.kept_ids,
                    noise.token_ids,
                    noisy,
                    noise.timesteps,
                    text=None if name == "null" else samples.text,
                    layout=samples.layout if name == "full" else None,
                    grid=samples.grid,
                    full_precision_head=True,
                )  # [n, p, K, 2C]
            eps[name], fractions[name] = output.float().chunk(2, dim=-1)  # each [n, p, K, C]
        scales = guidance_scales(config, num_tokens, next_masked, noise.iteration)
        return combine_branches(eps, *scales), fractions["full"]
