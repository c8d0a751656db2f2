"""The sampler without any precomputation: the readable reference that `models.sampling.sampler` must equal.

Without its guidance interval and its condition cache, too: here every branch runs in every iteration.

Every iteration runs the whole backbone (`StructMAR.predict`) on every token, every reverse step the whole head.
Shape letters as in `models/sampling/sampler.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from models.heads.diffusion import ReverseStep, normal_log_prob, reverse_steps
from models.masking import cosine_masked_counts
from models.sampling.sampler import (
    Branches,
    NoiseSource,
    SamplingConfig,
    Trace,
    guidance_scales,
    iteration_ids,
    write_trace,
)
from models.structmar import StructMAR, gather_tokens


def plain_reverse_process(
    model: StructMAR,
    z: Tensor,
    branches: Branches,
    scales: tuple[float, float],
    noise: Tensor,
    config: SamplingConfig,
    record: list[tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Draws r tokens. z: [G, r, D]; noise: [S + 1, r, C], the start and one per reverse step; gives [r, C] float32.

    record: gets, per reverse step, the state after it [r, C] and the log-probability of its draw [r].
    """
    num_branches = z.shape[0]
    flat_z = z.flatten(0, 1)  # [G * r, D]
    steps = reverse_steps(config.num_sampling_steps, config.t_max)
    x = noise[0]  # [r, C]
    for index, step in enumerate(steps):
        if index == 0:
            with torch.autocast(x.device.type, enabled=False):
                output = _head(model, x, step, flat_z.float(), num_branches)  # [G, r, 2C]
        else:
            output = _head(model, x, step, flat_z, num_branches)  # [G, r, 2C]
        eps, fraction = output.float().chunk(2, dim=-1)  # each [G, r, C]
        guided = branches.combine(eps, *scales)  # [r, C]
        before = x  # [r, C]
        x = step(x, guided, fraction[0], noise[index + 1], config.temperature, config.clip_x0)  # [r, C]
        if record is not None:
            record.append((x, _drawn_log_prob(step, before, guided, fraction[0], x, config)))
    return x


def _drawn_log_prob(
    step: ReverseStep, before: Tensor, eps: Tensor, fraction: Tensor, after: Tensor, config: SamplingConfig
) -> Tensor:
    """Of one reverse step from `before` to `after`; all [r, C]; gives [r], 0 for the last step."""
    if step.is_last:
        return after.new_zeros(len(after))  # [r]
    mean, log_variance = step.distribution(before, eps, fraction, config.clip_x0)  # each [r, C]
    return normal_log_prob(after, mean, 0.5 * log_variance + math.log(config.temperature))  # [r]


def _head(model: StructMAR, x: Tensor, step: ReverseStep, flat_z: Tensor, num_branches: int) -> Tensor:
    timesteps = torch.full((flat_z.shape[0],), step.timestep, device=x.device)  # [G * r]
    return model.diffloss.net(x.repeat(num_branches, 1), timesteps, flat_z).unflatten(0, (num_branches, -1))


def plain_uncover(
    model: StructMAR,
    branches: Branches,
    orders: Tensor,
    noise: NoiseSource,
    config: SamplingConfig,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    trace: Trace | None = None,
) -> Tensor:
    """The loop. orders: [B, L]; noise(iteration, S + 1, p) gives [S + 1, B, p, C]; returns tokens [B, L, C] float32.

    trace: filled in place if given (`empty_trace`).
    """
    batch_size, num_tokens = orders.shape
    num_branches = len(branches.names)
    counts = cosine_masked_counts(num_tokens, config.num_iter)
    tokens = torch.zeros(batch_size, num_tokens, model.config.token_dim, device=orders.device)  # [B, L, C]
    for iteration in progress(range(config.num_iter)):
        kept_ids, target_ids = iteration_ids(orders, counts, iteration)  # [B, L - now], [B, p]
        at = config.at(iteration)
        num_steps = len(reverse_steps(at.num_sampling_steps, at.t_max))
        z = model.predict(
            tokens.repeat(num_branches, 1, 1), kept_ids.repeat(num_branches, 1), branches.conditions
        )  # [G * B, L, D]
        z = gather_tokens(z, target_ids.repeat(num_branches, 1))  # [G * B, p, D]
        z = z.unflatten(0, (num_branches, batch_size)).flatten(1, 2)  # [G, B * p, D]
        draws = noise(iteration, num_steps + 1, target_ids.shape[1]).flatten(1, 2)  # [S + 1, B * p, C]
        scales = guidance_scales(config, num_tokens, counts[iteration + 1])
        record: list[tuple[Tensor, Tensor]] | None = None if trace is None else []
        drawn = plain_reverse_process(model, z, branches, scales, draws, at, record)  # [B * p, C]
        if trace is not None and record is not None:
            write_trace(trace, target_ids, draws[0], record)
        drawn = drawn.unflatten(0, (batch_size, -1))  # [B, p, C]
        tokens = tokens.scatter(1, target_ids[..., None].expand_as(drawn), drawn)  # [B, L, C]
    return tokens
