"""Gaussian diffusion of one token: the noise schedule, the training loss and one reverse step.

Cosine schedule and learned variance of Improved DDPM (arXiv:2102.09672), as MAR's head uses them. The network predicts
the noise eps and, per channel, where the log-variance lies between its two bounds. Only epsilon prediction with the
hybrid loss L_simple + L_vlb is here; nothing else of that paper's code is.

Known trap: the cosine schedule leaves alpha_bar(999) = 2.4e-9, so the first reverse step multiplies an error of eps by
316 (100 steps) to 7707 (5 steps). `clip_x0` and `t_max` tame it.

Shape letters: S reverse steps, r rows (tokens), C channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.config import NUM_TRAIN_STEPS, require_reverse_steps

MAX_BETA = 0.999
DISTANCE_WEIGHTS = (1.0, 100.0)  # of `prediction_distance`
VARIANCE_WEIGHT = 0.05


@dataclass(frozen=True)
class DiffusionSchedule:
    """A (possibly thinned) diffusion process.

    timesteps: original timestep of each step, ascending [S]. alphas_cumprod: [S] float64.
    """

    timesteps: tuple[int, ...]
    alphas_cumprod: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def _previous(self) -> NDArray[np.float64]:
        return np.append(1.0, self.alphas_cumprod[:-1])

    @property
    def betas(self) -> NDArray[np.float64]:
        return 1.0 - self.alphas_cumprod / self._previous

    def tables(self) -> dict[str, NDArray[np.float64]]:
        """Every coefficient that the loss and the reverse step need, [S] float64 each."""
        bar, previous, betas = self.alphas_cumprod, self._previous, self.betas
        variance = betas * (1.0 - previous) / (1.0 - bar)
        # The variance is 0 at the last reverse step: its log takes the next step's.
        clipped = np.append(variance[1], variance[1:]) if len(self) > 1 else np.full(1, betas[0])
        return {
            "sqrt_alphas_cumprod": np.sqrt(bar),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - bar),
            "x0_from_x": np.sqrt(1.0 / bar),
            "x0_from_eps": np.sqrt(1.0 / bar - 1.0),
            "mean_from_x0": betas * np.sqrt(previous) / (1.0 - bar),
            "mean_from_x": (1.0 - previous) * np.sqrt(1.0 - betas) / (1.0 - bar),
            "log_variance_min": np.log(clipped),
            "log_variance_max": np.log(betas),
        }


@lru_cache
def training_schedule() -> DiffusionSchedule:
    """The 1000-step cosine schedule."""

    def alpha_bar(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    steps = np.arange(NUM_TRAIN_STEPS) / NUM_TRAIN_STEPS
    ratios = [alpha_bar(t + 1 / NUM_TRAIN_STEPS) / alpha_bar(t) for t in steps.tolist()]
    betas = np.minimum(1 - np.array(ratios, dtype=np.float64), MAX_BETA)
    return DiffusionSchedule(tuple(range(NUM_TRAIN_STEPS)), np.cumprod(1.0 - betas, dtype=np.float64))


@lru_cache
def sampling_schedule(num_steps: int, t_max: int | None = None) -> DiffusionSchedule:
    """`num_steps` evenly spaced steps of the training schedule; those above `t_max` are clipped to it and merged.

    Raises ValueError if num_steps is not in 1..1000 or t_max not in 0..999.
    """
    require_reverse_steps(num_steps, t_max)
    stride = (NUM_TRAIN_STEPS - 1) / (num_steps - 1) if num_steps > 1 else 1.0
    chosen = {round(step * stride) for step in range(num_steps)}
    if t_max is not None:
        chosen = {min(step, t_max) for step in chosen}
    timesteps = tuple(sorted(chosen))
    return DiffusionSchedule(timesteps, training_schedule().alphas_cumprod[list(timesteps)])


def add_noise(x0: Tensor, noise: Tensor, tables: dict[str, Tensor]) -> Tensor:
    """x_t = sqrt(bar) x0 + sqrt(1 - bar) noise. x0, noise: [r, C]; tables: rows gathered per token, [r, 1] each."""
    return tables["sqrt_alphas_cumprod"] * x0 + tables["sqrt_one_minus_alphas_cumprod"] * noise  # [r, C]


def _posterior_mean(x0: Tensor, x: Tensor, tables: dict[str, Tensor]) -> Tensor:
    return tables["mean_from_x0"] * x0 + tables["mean_from_x"] * x  # [r, C]


def _log_variance(fraction: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """fraction: the network's second half, nominally in [-1, 1]."""
    share = (fraction + 1) / 2  # [r, C]
    return share * high + (1 - share) * low  # [r, C]


def hybrid_loss(
    x0: Tensor, x: Tensor, noise: Tensor, output: Tensor, timesteps: Tensor, tables: dict[str, Tensor]
) -> Tensor:
    """MSE of eps plus the variational bound in bits, which trains the variance only. Returns [r] float32.

    x0, x, noise: [r, C]; output: [r, 2C], eps and variance fraction; timesteps: [r]; tables: [r, 1] each.
    """
    eps, fraction = output.float().chunk(2, dim=-1)  # each [r, C]
    mse = (noise - eps).square().mean(-1)  # [r]

    low, high = tables["log_variance_min"], tables["log_variance_max"]
    predicted_x0 = tables["x0_from_x"] * x - tables["x0_from_eps"] * eps.detach()  # [r, C]
    mean = _posterior_mean(predicted_x0, x, tables)  # [r, C]
    log_variance = _log_variance(fraction, low, high)  # [r, C]
    kl = _gaussian_kl(_posterior_mean(x0, x, tables), low, mean, log_variance).mean(-1)  # [r]
    nll = -_discretized_log_likelihood(x0, mean, 0.5 * log_variance).mean(-1)  # [r]
    bound = torch.where(timesteps == 0, nll, kl) / math.log(2.0)  # [r]
    return mse + bound  # [r]


def prediction_distance(output: Tensor, wanted: Tensor, tables: dict[str, Tensor]) -> Tensor:
    """How far a prediction is from another one of the same noisy tokens: [r] float32, means over the C channels of

        w(t) (eps - eps')^2 + 0.05 (v - v')^2,    w(t) = (1 - bar) / bar, kept in [1, 100],

    with v the variance fraction. w(t) makes it the error of the predicted token where neither bound holds: at low noise
    the lower one keeps details in the sum, and the upper one keeps the first reverse steps from being all of it.
    output, wanted: [r, 2C]; tables: [r, 1] each.
    """
    eps, fraction = output.float().chunk(2, dim=-1)  # each [r, C]
    wanted_eps, wanted_fraction = wanted.float().chunk(2, dim=-1)  # each [r, C]
    weight = tables["x0_from_eps"].square().clamp(*DISTANCE_WEIGHTS)  # [r, 1]
    of_eps = weight * (eps - wanted_eps).square()  # [r, C]
    return (of_eps + VARIANCE_WEIGHT * (fraction - wanted_fraction).square()).mean(-1)  # [r]


def _gaussian_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
    return 0.5 * (
        -1.0 + log_var2 - log_var1 + (log_var1 - log_var2).exp() + (mean1 - mean2).square() * (-log_var2).exp()
    )  # [r, C]


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation that the training objective of MAR's weights was defined with."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(3))))


def _discretized_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability of x's bin of width 2/255; the outermost bins of [-1, 1] reach to infinity."""
    inverse_std = (-log_std).exp()  # [r, C]
    upper = _normal_cdf(inverse_std * (x - mean + 1 / 255))  # [r, C]
    lower = _normal_cdf(inverse_std * (x - mean - 1 / 255))  # [r, C]
    inner = (upper - lower).clamp(min=1e-12).log()  # [r, C]
    last = (1.0 - lower).clamp(min=1e-12).log()  # [r, C]
    first = upper.clamp(min=1e-12).log()  # [r, C]
    return torch.where(x < -0.999, first, torch.where(x > 0.999, last, inner))  # [r, C]


@dataclass(frozen=True)
class ReverseStep:
    """The coefficients of one reverse step as plain numbers, and the timestep the network is told."""

    timestep: int
    x0_from_x: float
    x0_from_eps: float
    mean_from_x0: float
    mean_from_x: float
    log_variance_min: float
    log_variance_max: float
    is_last: bool

    def __call__(
        self, x: Tensor, eps: Tensor, fraction: Tensor, noise: Tensor, temperature: float, clip_x0: float | None
    ) -> Tensor:
        """x_t -> x_{t-1}. x, eps, fraction, noise: [r, C] float32; clip_x0 bounds the predicted token; gives [r, C]."""
        mean = self._mean(x, eps, clip_x0)  # [r, C]
        if self.is_last:
            return mean
        # `distribution` in as few kernels as there are: std = exp(log_variance / 2) = middle * spread^fraction
        middle = math.exp((self.log_variance_max + self.log_variance_min) / 4)
        spread = math.exp((self.log_variance_max - self.log_variance_min) / 4)
        return torch.addcmul(mean, torch.pow(spread, fraction), noise, value=middle * temperature)  # [r, C]

    def distribution(self, x: Tensor, eps: Tensor, fraction: Tensor, clip_x0: float | None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, at temperature 1, of the Gaussian that x_{t-1} is drawn from. All [..., C] float32.

        The last step draws nothing: it returns the mean.
        """
        log_variance = _log_variance(fraction, self.log_variance_min, self.log_variance_max)  # [..., C]
        return self._mean(x, eps, clip_x0), log_variance

    def _mean(self, x: Tensor, eps: Tensor, clip_x0: float | None) -> Tensor:
        if clip_x0 is None:  # one sum of two products
            from_x = self.mean_from_x0 * self.x0_from_x + self.mean_from_x
            return torch.add(from_x * x, eps, alpha=-self.mean_from_x0 * self.x0_from_eps)  # [..., C]
        x0 = (self.x0_from_x * x - self.x0_from_eps * eps).clamp(-clip_x0, clip_x0)  # [..., C]
        return self.mean_from_x0 * x0 + self.mean_from_x * x  # [..., C]


def normal_log_prob(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log N(x; mean, exp(log_std)^2), summed over the channels. All [..., C]; returns [...]."""
    scaled = (x - mean) * (-log_std).exp()  # [..., C]
    return (-0.5 * scaled.square() - log_std - 0.5 * math.log(2.0 * math.pi)).sum(-1)  # [...]


@lru_cache
def reverse_steps(num_steps: int, t_max: int | None = None) -> tuple[ReverseStep, ...]:
    """The reverse steps of `sampling_schedule`, from the noisiest to the last."""
    schedule = sampling_schedule(num_steps, t_max)
    tables = {name: table.tolist() for name, table in schedule.tables().items() if not name.startswith("sqrt")}
    return tuple(
        ReverseStep(timestep=timestep, is_last=index == 0, **{name: table[index] for name, table in tables.items()})
        for index, timestep in reversed(list(enumerate(schedule.timesteps)))
    )
