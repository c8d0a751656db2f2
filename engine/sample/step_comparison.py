"""Distances between what the head draws in few steps or evaluations and in many steps, under the same conditions.

The conditions z are those of sampled images: once every token is known, each iteration's z can be computed again. Every
token is then drawn R times with the steps in question (X), with the full number of steps (Y) and, for the floor, with
the full number and other noise (Z). Per token, over all pairs,

    energy(X, Y) = 2 E|x - y| - E|x - x'| - E|y - y'|,

which is not negative, 0 in expectation only for endless samples of equal distributions: so energy(Z, Y) is what R draws
of the same distribution give. Also the shift of a channel's mean and the change of its standard deviation, over all.

Shape letters: n tokens, R draws, G guidance branches, L image tokens, D width, C channels, S reverse steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from models.sampling.condition_cache import GuidedBackbone, plan_iterations
from models.sampling.config import SamplingConfig, guidance_scales
from models.sampling.guidance import Branches, embed_branches
from models.sampling.orders import PlannedOrder
from models.sampling.sampler import sample
from models.structmar import StructMAR
from util.rng import generator
from util.types import LayoutBatch, TextContext

MAX_ENERGY_RATIO = 1.1
MAX_CHANNEL_CHANGE = 0.02


@dataclass(frozen=True)
class HeadInputs:
    """What the head draws the n tokens of one iteration from. z: [G, n, D]; scales: of text and layout."""

    iteration: int
    z: Tensor
    branches: Branches
    scales: tuple[float, float]


@dataclass(frozen=True)
class HeadComparison:
    """energy: mean over tokens. mean_shift: the largest of a channel, in its standard deviations. std_change: the
    largest of a channel, as a share. floor_*: what other noise alone makes of energy, of the larger of both.
    calls: sequential head calls of an image."""

    energy: float
    mean_shift: float
    std_change: float
    floor_energy: float
    floor_change: float
    calls: int

    @property
    def is_accepted(self) -> bool:
        change = max(self.mean_shift, self.std_change)
        is_near = change <= MAX_CHANNEL_CHANGE + self.floor_change
        return self.energy <= MAX_ENERGY_RATIO * self.floor_energy and is_near


@torch.no_grad()
def head_inputs(
    model: StructMAR,
    config: SamplingConfig,
    text: TextContext,
    layout: LayoutBatch,
    iterations: Sequence[int],
    seed: int = 0,
) -> list[HeadInputs]:
    """Samples an image per caption and layout, and rebuilds what the head was given in `iterations`."""
    generators = [generator("head inputs", seed, image) for image in range(len(layout))]
    output = sample(model, config, generators, text, layout)
    branches, config = embed_branches(model, config, len(layout), text, layout, None)
    counts = config.masked_counts(model.config.num_tokens)
    order = PlannedOrder(output.orders, counts)
    plans = plan_iterations(order, config.branch_uses(len(branches.names)))
    context = model.prepare(branches.conditions, torch.float32)
    backbone = GuidedBackbone(len(branches.names))
    inputs = []
    for iteration in iterations:
        z = backbone(context, output.tokens, plans[iteration]).flatten(1, 2)  # [G, n, D]
        scales = guidance_scales(config, model.config.num_tokens, counts[iteration + 1], iteration)
        inputs.append(HeadInputs(iteration, z, branches, scales))
    return inputs


@torch.no_grad()
def draw_tokens(
    model: StructMAR, config: SamplingConfig, inputs: Sequence[HeadInputs], num_draws: int, seed: int
) -> Tensor:
    """Draws every token of `inputs` R = `num_draws` times, in the steps of its iteration by `config`: [n, R, C]."""
    head = model.head.sampler(model.head, compile_mode=None)
    drawn = []
    for given in inputs:
        step = head.at(config.head_options(given.iteration))
        heard = given.z if config.head_evals is None else given.z[:1]  # [G or 1, n, D]: it has learned guidance
        z = heard.repeat_interleave(num_draws, dim=1)  # [G or 1, n * R, D]
        noise = step.draw_noise([generator("head draws", seed, given.iteration)], z.shape[1])[:, 0]  # [S + 1, n * R, C]
        w_text, w_layout = given.scales
        guide = partial(given.branches.combine, w_text=w_text, w_layout=w_layout)
        drawn.append(step.sample(z, guide, noise).tokens.unflatten(0, (-1, num_draws)))
    return torch.cat(drawn)  # [n, R, C]


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """x, y: [n, R, C], R samples of each of n pairs of distributions; gives [n]. Equal samples are 0 apart."""
    across, within_x, within_y = (torch.cdist(a, b).mean(dim=(1, 2)) for a, b in ((x, y), (x, x), (y, y)))  # [n] each
    return 2 * across - within_x - within_y  # [n]


def channel_changes(drawn: Tensor, reference: Tensor) -> tuple[float, float]:
    """The largest shift of a channel's mean, in standard deviations, and change of its deviation. Both [n, R, C]."""
    mean, std = drawn.mean((0, 1)), drawn.flatten(0, 1).std(0)  # each [C]
    expected_mean, expected_std = reference.mean((0, 1)), reference.flatten(0, 1).std(0)  # each [C]
    shift = ((mean - expected_mean) / expected_std).abs().max()
    return float(shift), float((std / expected_std - 1).abs().max())


def compare(drawn: Tensor, reference: Tensor, floor: Tensor, calls: int) -> HeadComparison:
    """All [n, R, C]: with the steps in question, with the full number, with the full number and other noise."""
    mean_shift, std_change = channel_changes(drawn, reference)
    return HeadComparison(
        energy=float(energy_distance(drawn, reference).mean()),
        mean_shift=mean_shift,
        std_change=std_change,
        floor_energy=float(energy_distance(floor, reference).mean()),
        floor_change=max(channel_changes(floor, reference)),
        calls=calls,
    )


def compare_steps(
    model: StructMAR,
    config: SamplingConfig,
    inputs: Sequence[HeadInputs],
    options: Sequence[SamplingConfig],
    num_draws: int = 8,
    full_steps: int = 100,
) -> list[HeadComparison]:
    """A comparison of each of `options` with `full_steps` reverse steps by `config` in all iterations."""
    plain = replace(config, num_sampling_steps=full_steps, num_sampling_steps_last=None)
    reference, floor = (draw_tokens(model, plain, inputs, num_draws, seed) for seed in (0, 1))
    found = []
    for tried in options:
        calls = sum(tried.head_options(iteration).num_calls for iteration in range(tried.num_iter))
        found.append(compare(draw_tokens(model, tried, inputs, num_draws, 2), reference, floor, calls))
    return found
