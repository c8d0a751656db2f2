"""Both estimators against closed forms: tokens of one channel, Gaussian data, the optimal denoiser.

Data x ~ N(mu, s^2). At noise level t the best guess of the noise is linear in x_t,

    eps(x_t) = sqrt(1 - bar) (x_t - sqrt(bar) mu) / v,   v = bar s^2 + 1 - bar,

and mu is the only parameter. So everything the head predicts is known, and so are the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.heads.diffusion import ReverseStep, reverse_steps, training_schedule
from models.policy.base import Samples, collect_samples
from models.policy.elbo import ElboEstimator
from models.policy.trajectory import TrajectoryEstimator
from models.sampling.config import SamplingConfig
from models.sampling.sampler import sample
from models.structmar import StructMAR, StructMARConfig
from tests.helpers.structured import generator

MU, STD = 0.3, 0.7
TINY = StructMARConfig(
    img_size=16,
    vae_stride=4,
    vae_embed_dim=1,
    encoder_embed_dim=8,
    encoder_depth=1,
    encoder_num_heads=1,
    decoder_embed_dim=8,
    decoder_depth=1,
    decoder_num_heads=1,
    buffer_size=1,
    diffloss_d=1,
    diffloss_w=8,
    rope_mode="off",
)


class OptimalDenoiser(nn.Module):
    bars: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.tensor(MU))
        self.register_buffer("bars", torch.tensor(training_schedule().alphas_cumprod))

    def forward(self, x: Tensor, timesteps: Tensor, _z: Tensor) -> Tensor:
        """x: [r, 1]; returns [r, 2]: eps, and -1 for the lower bound of the variance."""
        bar = self.bars[timesteps][:, None]
        eps = (1 - bar).sqrt() * (x - bar.sqrt() * self.mu) / (bar * STD**2 + 1 - bar)
        return torch.cat([eps.float(), torch.full_like(x, -1.0)], dim=1)

    # What the sampler asks of the head: nothing depends on z, and the timesteps modulate as they are.

    def time_embed(self, timesteps: Tensor) -> Tensor:
        return timesteps[:, None]

    def cond_embed(self, z: Tensor) -> Tensor:
        return z

    def modulations(self, times: Tensor, embedded: Tensor) -> list[tuple[Tensor]]:
        return [(times.expand(-1, embedded.shape[1])[:, None],)]

    def modulated(self, x: Tensor, modulations: Sequence[tuple[Tensor]]) -> Tensor:
        return self(x, modulations[0][0][0], x)[None]


def linear_world() -> tuple[StructMAR, nn.Parameter]:
    torch.manual_seed(0)
    model = StructMAR(TINY).eval()
    denoiser = OptimalDenoiser()
    model.diffloss.add_module("net", denoiser)
    return model, denoiser.mu


def plain_samples(tokens: Tensor) -> Samples:
    orders = torch.arange(16).expand(len(tokens), -1)
    return Samples(tokens, orders, (4, 4), None, None)


def test_elbo_gradient_of_a_gaussian() -> None:
    """d l / d mu = c (x - mu) / s^2 with c = mean over t of 2 bar (1 - bar) s^2 / v^2 = 0.2440."""
    model, mu = linear_world()
    bar = training_schedule().alphas_cumprod
    share = float(np.mean(2 * bar * (1 - bar) * STD**2 / (bar * STD**2 + 1 - bar) ** 2))
    assert share == pytest.approx(0.2440, abs=5e-5)
    samples = plain_samples(torch.full((64, 16, 1), 1.1))
    for kappa in (1.0, 0.5):
        estimator = ElboEstimator(num_iter=1, num_masks=1, num_draws=64, kappa=kappa)
        log_prob = estimator.log_probs(model, samples, estimator.draw_noise(samples, generator())[0]).log_prob
        (gradient,) = torch.autograd.grad(log_prob.mean(), mu)
        assert float(gradient) == pytest.approx(kappa * share * (1.1 - MU) / STD**2, rel=0.02)


def test_antithetic_noise_lowers_the_variance() -> None:
    """Per token, the gradient by central difference: from eps and -eps, and from two independent noises."""
    model, mu = linear_world()
    samples = plain_samples(torch.full((256, 16, 1), 1.1))
    estimator = ElboEstimator(num_iter=1, num_masks=1, num_draws=2)
    (noise,) = estimator.draw_noise(samples, generator())
    assert noise.noise is not None
    independent = torch.randn(noise.noise.shape, generator=generator(1))
    variances = []
    for values_of_noise in (noise.noise, independent):
        given = replace(noise, noise=values_of_noise)
        values = []
        for shift in (0.01, -0.01):
            with torch.no_grad():
                mu.fill_(MU + shift)
                values.append(estimator.log_probs(model, samples, given).log_prob)
        variances.append(float(((values[0] - values[1]) / 0.02).var()))
    assert variances[0] < 0.7 * variances[1]


def linear_form(step: ReverseStep) -> tuple[float, float]:
    """a and b of the reverse step's mean, a x_t + b mu."""
    bar = float(training_schedule().alphas_cumprod[step.timestep])
    gain = (1 - bar) ** 0.5 / (bar * STD**2 + 1 - bar)
    a = step.mean_from_x0 * (step.x0_from_x - step.x0_from_eps * gain) + step.mean_from_x
    return a, step.mean_from_x0 * step.x0_from_eps * gain * bar**0.5


def test_trajectory_gradient_of_a_gaussian() -> None:
    """The policy gradient of E[x_0], summed over the allowed steps: sum_t b_t prod_(later s) a_s, by Monte Carlo.

    It is what d E[x_0] / d mu keeps without the skipped steps.
    """
    model, mu = linear_world()
    config = SamplingConfig(num_iter=1, num_sampling_steps=20)
    output = sample(model, config, [generator(seed) for seed in range(1024)], record=True)
    samples = collect_samples(output, None, None)
    estimator = TrajectoryEstimator(config, num_masks=1)
    (noise,) = estimator.draw_noise(samples, generator())
    log_prob = estimator.log_probs(model, samples, noise).log_prob  # [n, 16, K]
    reward = samples.tokens - MU  # [n, 16, 1]
    parts = (reward * log_prob).sum(-1).unflatten(0, (32, -1)).mean((1, 2))  # [32]
    gradients = torch.stack([torch.autograd.grad(part, mu, retain_graph=True)[0] for part in parts])

    forms = [linear_form(step) for step in reverse_steps(20)]
    after = [float(np.prod([a for a, _ in forms[k + 1 :]])) for k in range(len(forms))]
    share = [b * later for (_, b), later in zip(forms, after, strict=True)]
    expected = sum(share[k] for k in estimator.allowed_steps)
    error = float(gradients.std()) / 32**0.5
    assert error < 0.03
    assert float(gradients.mean()) == pytest.approx(expected, abs=3 * error)
    assert sum(share) == pytest.approx(1.0, abs=0.02) and 0.9 < expected < sum(share)
    assert float(samples.tokens.mean()) == pytest.approx(MU, abs=0.02)
    assert float(samples.tokens.std()) == pytest.approx(STD, abs=0.1)
