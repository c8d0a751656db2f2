"""Log-probabilities of sampled tokens under a StructMAR, with gradients: what a policy gradient needs of the model.

A masked autoregressive model has no likelihood at hand, since every token comes out of a diffusion head. Two estimators
stand in for it, behind one interface:

`ElboEstimator` scores a finished token x by its denoising error at shared noise levels and noises,

    l = -kappa / K * sum_k || eps_k - eps_theta(sqrt(bar_k) x + sqrt(1 - bar_k) eps_k, t_k, z) ||^2,

and `TrajectoryEstimator` scores the recorded reverse steps x_t -> x_{t-1}, which are Gaussian,

    l_t = log N(x_{t-1}; mu_theta(x_t, t, z), (temperature * sigma_theta)^2).

Both rebuild the backbone's inputs from the final tokens and the order alone: a token never changes once it is drawn.
Random choices (`ScoringNoise`) are made once and shared by the old, the current and the reference policy, so that at
equal weights their log-probabilities are equal to the bit; with choices of their own the ratio would be noise.
Left out: the probability of the order (it is drawn uniformly), the variational terms of the training loss, several
reverse processes per token. The model must be in eval mode (dropout would be a different policy at every call).

Shape letters: n images, L image tokens, C token channels, m masked tokens, p tokens scored in one pass of the backbone,
K noises (or reverse steps) per token, S reverse steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from models.blocks import gather_tokens
from models.config import NUM_TRAIN_STEPS
from models.heads.base import HeadTrace
from models.heads.diffusion import ReverseStep, normal_log_prob, reverse_steps
from models.heads.diffusion_sampler import Trace
from models.masking import cosine_masked_counts
from models.sampling.config import SamplingConfig, guidance_scales
from models.sampling.guidance import choose_branches, combine_branches
from models.sampling.orders import iteration_ids
from models.sampling.sampler import SampleOutput
from models.structmar import StructMAR, TrainingNoise
from util.types import LayoutBatch, TextContext


@dataclass(frozen=True)
class Samples:
    """Sampled images and what they were sampled for.

    tokens: [n, L, C] float32, the final ones, of a (rows, columns) grid. orders: [n, L] int64, unmasked from the end.
    text, layout: n rows each. trace: the reverse processes, n rows, if recorded.
    """

    tokens: Tensor
    orders: Tensor
    grid: tuple[int, int]
    text: TextContext | None
    layout: LayoutBatch | None
    trace: HeadTrace | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]


def collect_samples(output: SampleOutput, text: TextContext | None, layout: LayoutBatch | None) -> Samples:
    """The sampler's output as Samples; text and layout are those it was given."""
    return Samples(output.tokens, output.orders, output.grid, text, layout, output.trace)


@dataclass(frozen=True)
class PolicyOutput:
    """The log-probabilities of one pass, one per ratio, and the network's prediction behind them.

    log_prob: [n, p] (elbo) or [n, p, K] (trajectory) float32. mean: [n, p, K, C] float32, the predicted noise (elbo) or
    the mean of the next state (trajectory). log_std: [n, p, K, C], trajectory only.
    """

    log_prob: Tensor
    mean: Tensor
    log_std: Tensor | None = None


@dataclass(frozen=True)
class ScoringNoise:
    """Everything random about one pass; drawn once, shared by the old, the current and the reference policy.

    kept_ids: [n, L - m], the visible tokens. token_ids: [n, p], the scored ones. timesteps: [n, p, K] int64, what the
    network is told. noise: [n, p, K, C] (elbo) or None. steps: K indices into `reverse_steps` (trajectory) or None.
    iteration: the sampler's iteration that the pass belongs to.
    """

    kept_ids: Tensor
    token_ids: Tensor
    timesteps: Tensor
    noise: Tensor | None
    steps: tuple[int, ...] | None
    iteration: int


class Estimator(Protocol):
    """needs_trace: the samples must have been recorded (`sample(..., record=True)`). num_masks: passes of the backbone.
    num_draws: per token; None: all reverse steps that may be scored."""

    @property
    def needs_trace(self) -> bool: ...

    @property
    def num_masks(self) -> int: ...

    @property
    def num_draws(self) -> int | None: ...

    def draw_noise(self, samples: Samples, generator: torch.Generator) -> list[ScoringNoise]:
        """The random choices, one entry per pass of the backbone. They are drawn on the generator's device."""

    def log_probs(self, model: StructMAR, samples: Samples, noise: ScoringNoise) -> PolicyOutput:
        """One pass, with gradients if they are enabled."""


def draw_iterations(counts: Sequence[int], num_masks: int, generator: torch.Generator) -> list[int]:
    """`num_masks` iterations of the sampler, ascending, stratified over the tokens in the order they are unmasked.

    Position u_j = (j + U_j) / num_masks of the L tokens falls into the iteration that unmasks that token, so an
    iteration is hit in proportion to the tokens it unmasks: the mean over passes of the mean over a pass's tokens is,
    in expectation, the mean over all tokens. counts: `cosine_masked_counts`.
    """
    num_tokens = counts[0]
    uniform = torch.rand(num_masks, dtype=torch.float64, generator=generator, device=generator.device)
    positions = [(index + u) / num_masks * num_tokens for index, u in enumerate(uniform.tolist())]
    return [sum(1 for hidden in counts[1:-1] if num_tokens - hidden <= position) for position in positions]


def _check_masks(num_masks: int, num_iter: int) -> None:
    if num_iter < 1:
        raise ValueError(f"num_iter must be at least 1, got {num_iter}")
    if not 1 <= num_masks <= num_iter:
        raise ValueError(f"num_masks must lie between 1 and num_iter = {num_iter}, got {num_masks}")


@dataclass(frozen=True)
class ElboEstimator:
    """Scores all masked tokens of `num_masks` masks of the rollout by their denoising error; the log-probability of a
    token is its mean over `num_draws` pairs (t, eps), taken before the ratio is.

    num_iter: the sampler's. num_draws: even; half as many timesteps, stratified, are each used with eps and with -eps.
    kappa: scale of the log-probability, hence of ratio and KL.

    What to know: (1) The difference of two such log-probabilities holds the error of the Monte Carlo mean, so k3 of it
    is a penalty on the change of eps, not a KL divergence in nats. (2) Samples drawn with guidance are off-policy for
    these unguided log-probabilities, and the temperature is ignored: allowed, but a caller should say so. (3) Uniform t
    scales the score's gradient by a factor below 1 that depends on the data's density; it is exact in direction only
    for a shift of the mean. (4) A lower bound: for negative advantages, widening the bound's gap lowers the objective
    too, so keep the clip and the KL.
    """

    num_iter: int
    num_masks: int = 4
    num_draws: int = 8
    kappa: float = 1.0

    def __post_init__(self) -> None:
        _check_masks(self.num_masks, self.num_iter)
        if self.num_draws < 2 or self.num_draws % 2:
            raise ValueError(f"num_draws must be even and at least 2, got {self.num_draws}")
        if not self.kappa > 0:
            raise ValueError(f"kappa must be positive, got {self.kappa}")

    @property
    def needs_trace(self) -> bool:
        return False

    def draw_noise(self, samples: Samples, generator: torch.Generator) -> list[ScoringNoise]:
        """See `Estimator`. All images share the sizes of the masks; orders, timesteps and noises are their own."""
        counts = cosine_masked_counts(samples.orders.shape[1], self.num_iter)
        iterations = draw_iterations(counts, self.num_masks, generator)
        return [self._draw_pass(samples, counts[iteration], iteration, generator) for iteration in iterations]

    def _draw_pass(self, samples: Samples, num_masked: int, iteration: int, generator: torch.Generator) -> ScoringNoise:
        orders, device = samples.orders, samples.tokens.device
        half, source = self.num_draws // 2, generator.device
        shape = (len(samples), num_masked, half)
        uniform = torch.rand(shape, generator=generator, device=source)  # [n, m, K / 2]
        strata = torch.arange(half, device=source)  # [K / 2]
        timesteps = ((strata + uniform) * (NUM_TRAIN_STEPS / half)).long().clamp(max=NUM_TRAIN_STEPS - 1)
        noise = torch.randn(*shape, samples.tokens.shape[2], generator=generator, device=source)  # [n, m, K / 2, C]
        return ScoringNoise(
            kept_ids=orders[:, num_masked:].sort(dim=1).values,
            token_ids=orders[:, :num_masked].sort(dim=1).values,
            timesteps=torch.cat([timesteps, timesteps], dim=2).to(device),
            noise=torch.cat([noise, -noise], dim=2).to(device),
            steps=None,
            iteration=iteration,
        )

    def log_probs(self, model: StructMAR, samples: Samples, noise: ScoringNoise) -> PolicyOutput:
        """One pass: log_prob [n, p], mean (the predicted eps) [n, p, K, C]."""
        if noise.noise is None:
            raise ValueError("this noise is another estimator's: it has reverse steps instead of noises")
        assert not model.training, "log-probabilities need model.eval()"
        target = gather_tokens(samples.tokens, noise.token_ids)[:, :, None]  # [n, p, 1, C]
        noisy = model.diffloss.add_noise(target, noise.timesteps, noise.noise)  # [n, p, K, C]
        output = model.denoise(
            samples.tokens,
            noise.kept_ids,
            noise.token_ids,
            noisy,
            noise.timesteps,
            text=samples.text,
            layout=samples.layout,
            grid=samples.grid,
        )  # [n, p, K, 2C]
        eps = output.float().chunk(2, dim=-1)[0]  # [n, p, K, C]
        errors = (noise.noise - eps).square().sum(-1)  # [n, p, K]
        return PolicyOutput(-self.kappa * errors.mean(-1), eps)


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
        _check_masks(self.num_masks, self.config.num_iter)
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


@dataclass(frozen=True)
class LossInputs:
    """The arguments of `StructMAR.forward`."""

    latents: Tensor
    noise: TrainingNoise
    labels: Tensor | None = None
    text: TextContext | None = None
    layout: LayoutBatch | None = None


class Policy(nn.Module):
    """A model and an estimator behind one `forward`, since wrappers such as DDP act on `forward` alone."""

    def __init__(self, model: StructMAR, estimator: Estimator) -> None:
        super().__init__()
        self.model = model
        self.estimator = estimator

    def forward(self, inputs: Samples | LossInputs, noise: ScoringNoise | None = None) -> PolicyOutput | Tensor:
        """Samples with the noise of one pass give a PolicyOutput; LossInputs give the model's own loss, a scalar."""
        if isinstance(inputs, LossInputs):
            return self.model(inputs.latents, inputs.noise, inputs.labels, inputs.text, inputs.layout)
        if noise is None:
            raise ValueError("the log-probabilities of samples need noise")
        return self.estimator.log_probs(self.model, inputs, noise)
