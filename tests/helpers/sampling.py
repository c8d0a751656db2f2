"""The sampler's loop on orders and noise that a test gives."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from models.heads.base import HeadStep
from models.heads.diffusion_sampler import DiffusionStep, Trace
from models.masking import cosine_masked_counts
from models.sampling.config import SamplingConfig
from models.sampling.controls import NoControls
from models.sampling.guidance import Branches
from models.sampling.orders import PlannedOrder
from models.sampling.sampler import SamplingRun, unmask
from models.structmar import StructMAR
from tests.helpers.plain_sampler import PlainNoise


def run_unmask(
    model: StructMAR,
    branches: Branches,
    orders: Tensor,
    noise: PlainNoise,
    config: SamplingConfig,
    *,
    dtype: torch.dtype = torch.float32,
    record: bool = False,
    iterations: Iterable[int] | None = None,
) -> tuple[Tensor, Trace | None]:
    """orders: [B, L]; noise(iteration, S + 1, p) gives [S + 1, B, p, C]; returns tokens [B, L, C] and the trace."""

    def step_noise(iteration: int, step: HeadStep, num_tokens: int) -> Tensor:
        return noise(iteration, len(cast(DiffusionStep, step).times) + 1, num_tokens)

    generators = [torch.Generator()] * len(orders)  # not drawn from
    run = SamplingRun(model, branches, config, generators, NoControls(), dtype, record)
    order = PlannedOrder(orders, cosine_masked_counts(orders.shape[1], config.num_iter))
    tokens, _, trace = unmask(run, run.start(), order, step_noise, iterations=iterations)
    return tokens, cast(Trace | None, trace)
