"""The few-step head: a second network of the diffusion head that draws a token in 1 to 8 evaluations.

The first evaluation starts from noise, every other from the token of the one before with fresh noise on it:

    x_1 = noise,    x_k = sqrt(bar_k) y_{k-1} + sqrt(1 - bar_k) noise,
    y_k = (x_k - sqrt(1 - bar_k) f(x_k, t_k, z)) / sqrt(bar_k)

with f the first half of the network's output and bar of the training schedule at timestep t_k. So a network that begins
as the diffusion head's begins with its predictions of the token; above `FIRST_TIMESTEP` these say little of z, and
errors of f are multiplied. How it is fitted to what a reverse process draws: `models/few_step.py`. It has no
log-probabilities.

Shape letters: B images, G guidance branches, D backbone width, C token channels, N evaluations, r rows (tokens),
p tokens drawn in one iteration, W head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from models.compiled import compiled
from models.heads.adaln_mlp import SimpleMLPAdaLN
from models.heads.base import Guide, HeadOutput
from models.heads.diffusion import training_schedule

FIRST_TIMESTEP = 850  # sqrt(bar) is 0.23


@dataclass(frozen=True)
class Level:
    """What one evaluation starts from: its timestep, sqrt(bar) and sqrt(1 - bar)."""

    timestep: int
    signal: float
    noise: float


@lru_cache
def levels(num_evals: int) -> tuple[Level, ...]:
    """The noise levels of so many evaluations, evenly down from `FIRST_TIMESTEP` towards 0."""
    timesteps = [round(FIRST_TIMESTEP * (num_evals - index) / num_evals) for index in range(num_evals)]
    bars = training_schedule().alphas_cumprod
    return tuple(Level(t, math.sqrt(bars[t]), math.sqrt(1 - bars[t])) for t in timesteps)


@dataclass(frozen=True)
class FewOptions:
    """num_evals: of the network for a token; temperature: factor on all noise; clip_x0: bound of predicted tokens."""

    num_evals: int
    temperature: float = 1.0
    clip_x0: float | None = None

    @property
    def num_calls(self) -> int:
        """How often the head runs for a token."""
        return self.num_evals


@dataclass(frozen=True)
class FewStep:
    """A `HeadStep` of the network `net`."""

    net: SimpleMLPAdaLN
    options: FewOptions
    channels: int
    device: torch.device
    compile_mode: str | None = None

    def draw_noise(self, generators: Sequence[torch.Generator], num_tokens: int) -> Tensor:
        """The noise of each evaluation: [N, B, p, C] on the head's device."""
        shape = (self.options.num_evals, num_tokens, self.channels)
        drawn = [torch.randn(shape, generator=each, device=each.device) for each in generators]
        return torch.stack(drawn, dim=1).to(self.device)  # [N, B, p, C]

    def sample(self, z: Tensor, guide: Guide, noise: Tensor, record: bool = False) -> HeadOutput:
        """Draws r tokens. z: [1, r, D], as there is no guidance; noise: [N, r, C]; gives tokens [r, C] float32."""
        assert len(z) == 1 and not record, "a few-step head knows neither guidance nor records"
        options, steps = self.options, levels(self.options.num_evals)
        run = SimpleMLPAdaLN.modulated
        if self.compile_mode is not None:
            run = compiled(SimpleMLPAdaLN.modulated, self.compile_mode)
        times = self.net.time_embed(torch.tensor([step.timestep for step in steps], device=self.device))  # [N, W]
        embedded = self.net.cond_embed(z)  # [1, r, W]
        token = torch.zeros_like(noise[0])  # [r, C]
        for index, step in enumerate(steps):
            x = noisy(token, options.temperature * noise[index], step, is_first=index == 0)  # [r, C]
            layers = self.net.modulations(times[index : index + 1], embedded)
            output = run(self.net, x, [tuple(part[0] for part in layer) for layer in layers])  # [1, r, 2C]
            token = predicted(x, output[0].float(), step)  # [r, C]
            if options.clip_x0 is not None:
                token = token.clamp(-options.clip_x0, options.clip_x0)  # [r, C]
        return HeadOutput(token)


def noisy(token: Tensor, noise: Tensor, level: Level, is_first: bool) -> Tensor:
    """What an evaluation gets: the token before with noise on it, or noise alone at first. All [..., C]."""
    return noise if is_first else level.signal * token + level.noise * noise  # [..., C]


def predicted(x: Tensor, output: Tensor, level: Level) -> Tensor:
    """The token that an evaluation gives. x: [..., C]; output: of the network, [..., 2C]; gives [..., C]."""
    return (x - level.noise * output.chunk(2, dim=-1)[0]) / level.signal  # [..., C]
