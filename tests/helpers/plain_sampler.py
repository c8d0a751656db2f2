"""The sampler written out: the readable reference that `models/sampling/sampler.py` must equal.

Every iteration runs the whole backbone on every token (`plain_model.py`), every reverse step the whole head. There is
no guidance interval and no condition cache: every branch runs in every iteration. Shape letters as in the sampler.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.heads.diffusion import normal_log_prob
from models.heads.diffusion_sampler import ReverseOptions, Trace
from models.masking import cosine_masked_counts
from models.sampling.config import SamplingConfig, guidance_scales
from models.sampling.guidance import Branches
from models.structmar import StructMAR
from tests.helpers.plain_model import plain_head, plain_predict

PlainNoise = Callable[[int, int, int], Tensor]
"""(iteration, S + 1, p) -> [S + 1, B, p, C]."""


def plain_reverse_process(
    model: StructMAR,
    z: Tensor,
    branches: Branches,
    scales: tuple[float, float],
    noise: Tensor,
    options: ReverseOptions,
    record: list[tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Draws r tokens. z: [G, r, D]; noise: [S + 1, r, C], the start and one per reverse step; gives [r, C] float32.

    record: gets, per reverse step, the state after it [r, C] and the log-probability of its draw [r].
    """
    num_branches = z.shape[0]
    flat_z = z.flatten(0, 1)  # [G * r, D]
    x = noise[0]  # [r, C]
    for index, step in enumerate(options.steps):
        timesteps = torch.full((len(flat_z),), step.timestep, device=x.device)  # [G * r]
        repeated = x.repeat(num_branches, 1)  # [G * r, C]
        if index == 0:
            with torch.autocast(x.device.type, enabled=False):
                output = plain_head(model, repeated, timesteps, flat_z.float())  # [G * r, 2C]
        else:
            output = plain_head(model, repeated, timesteps, flat_z)  # [G * r, 2C]
        eps, fraction = output.float().unflatten(0, (num_branches, -1)).chunk(2, dim=-1)  # each [G, r, C]
        guided = branches.combine(eps, *scales)  # [r, C]
        mean, log_variance = step.distribution(x, guided, fraction[0], options.clip_x0)  # each [r, C]
        std = (0.5 * log_variance).exp() * options.temperature  # [r, C]
        x = mean if step.is_last else mean + std * noise[index + 1]  # [r, C]
        if record is not None:
            log_std = 0.5 * log_variance + math.log(options.temperature)  # [r, C]
            log_prob = x.new_zeros(len(x)) if step.is_last else normal_log_prob(x, mean, log_std)  # [r]
            record.append((x, log_prob))
    return x


def plain_unmask(
    model: StructMAR,
    branches: Branches,
    orders: Tensor,
    noise: PlainNoise,
    config: SamplingConfig,
    iterations: Sequence[int] | None = None,
    trace: Trace | None = None,
) -> Tensor:
    """The loop. orders: [B, L]; iterations: those that run, None: all; returns tokens [B, L, C] float32.

    trace: filled in place if given.
    """
    batch_size, num_tokens = orders.shape
    num_branches, conditions = len(branches.names), branches.conditions
    counts = cosine_masked_counts(num_tokens, config.num_iter)
    tokens = torch.zeros(batch_size, num_tokens, model.config.token_dim, device=orders.device)  # [B, L, C]
    rows = torch.arange(batch_size, device=orders.device)[:, None]  # [B, 1]
    for iteration in range(config.num_iter) if iterations is None else iterations:
        now, after = counts[iteration], counts[iteration + 1]
        kept_ids, token_ids = orders[:, now:].sort(1).values, orders[:, after:now].sort(1).values  # [B, n], [B, p]
        options = config.head_options(iteration)
        assert isinstance(options, ReverseOptions)
        z = plain_predict(model, tokens.repeat(num_branches, 1, 1), kept_ids.repeat(num_branches, 1), conditions)
        z = z.unflatten(0, (num_branches, batch_size))[:, rows, token_ids].flatten(1, 2)  # [G, B * p, D]
        drawn_noise = noise(iteration, len(options.steps) + 1, now - after).flatten(1, 2)  # [S + 1, B * p, C]
        scales = guidance_scales(config, num_tokens, after, iteration)
        record: list[tuple[Tensor, Tensor]] | None = None if trace is None else []
        drawn = plain_reverse_process(model, z, branches, scales, drawn_noise, options, record)  # [B * p, C]
        if trace is not None and record is not None:
            start = (drawn_noise[0], torch.zeros(len(drawn), device=drawn.device))
            trace.write(token_ids, [start, *record])
        tokens = tokens.index_put((rows, token_ids), drawn.unflatten(0, (batch_size, -1)))  # [B, L, C]
    return tokens
