"""Models on trained weights, sampled by the plain sampler or by ours on the same noise."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from engine.checkpoint.load import load_for_sampling
from models.heads.diffusion_sampler import Trace
from models.masking import sample_orders
from models.sampling.config import SamplingConfig
from models.sampling.guidance import embed_branches
from models.structmar import StructMAR
from tests.conftest import ROOT
from tests.helpers import reference
from tests.helpers.plain_sampler import PlainNoise, plain_unmask
from tests.helpers.sampling import run_unmask
from tests.helpers.structured import generator, some_layout, some_text, structured_model
from util.types import LayoutBatch, TextContext

QUICK = SamplingConfig(num_iter=3, num_sampling_steps=8, t_max=950)


@lru_cache
def world(name: str) -> StructMAR:
    """On trained weights, not to be changed. tiny: MAR's, with every new part on; mini: a stage-2 model; mar: bare."""
    if name == "mini":
        return load_for_sampling(ROOT / "pretrained_models/mini/structmar_mini_stage2.safetensors").model
    return structured_model() if name == "tiny" else reference.tiny_model()


def conditions(model: StructMAR) -> tuple[TextContext, LayoutBatch]:
    return some_text(model.config.text_dim), some_layout(model.config.max_objects)


def repeated_noise(channels: int) -> PlainNoise:
    """The same noise at every call."""

    def noise(iteration: int, num_draws: int, num_tokens: int) -> Tensor:
        return torch.randn(num_draws, 2, num_tokens, channels, generator=generator(iteration))

    return noise


@torch.no_grad()
def sampled(
    model: StructMAR,
    config: SamplingConfig,
    text: TextContext | None,
    layout: LayoutBatch | None,
    labels: Tensor | None = None,
    record: bool = False,
    plain: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Trace | None]:
    orders = sample_orders(2, model.config.num_tokens, [generator(7)])
    branches, config = embed_branches(model, config, 2, text, layout, labels)
    noise = repeated_noise(model.config.token_dim)
    if not plain:
        return run_unmask(model, branches, orders, noise, config, dtype=dtype, record=record)
    head = model.diffloss.sampler(model.diffloss, None)
    trace = head.empty_trace(*orders.shape, config.head_options(0), orders.device) if record else None
    return plain_unmask(model, branches, orders, noise, config, trace=trace), trace
