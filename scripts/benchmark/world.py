"""Trained models, sizes on random weights, and the conditions, orders and noise that all contenders share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.load import load_for_sampling, load_mar_for_sampling
from models.build import build_model
from models.heads.base import HeadStep
from models.heads.diffusion_sampler import DiffusionStep
from models.masking import sample_orders
from models.structmar import StructMAR, preset_config
from util.types import Layout, LayoutBatch, TextContext

NUM_TEXT = 14  # tokens of a caption
NUM_OBJECTS = 2
TRAINED_MAR, TRAINED = "trained MAR", "trained StructMAR"
STRUCTURED: dict[str, Any] = {"num_categories": 80, "text_dim": 512}

Models = Mapping[str, Callable[[], StructMAR]]
"""Name -> builds the model, in evaluation mode. What names no trained weights has random ones."""


def available_models(weights: Path | None, mar_weights: Path | None, mar_size: str) -> Models:
    """The sizes on random weights; the trained ones as given. "MAR" in a name: the bare backbone, with class labels."""
    models: dict[str, Callable[[], StructMAR]] = {
        "mar_base MAR": lambda: random_model("mar_base", rope_mode="off"),
        "mar_huge MAR": lambda: random_model("mar_huge", rope_mode="off"),
        "mar_base StructMAR": lambda: random_model("mar_base", **STRUCTURED),
        "maskgil_base StructMAR": lambda: random_model("maskgil_base", **STRUCTURED),
    }
    if mar_weights is not None:
        models[TRAINED_MAR] = lambda: load_mar_for_sampling(mar_weights, preset_config(mar_size, rope_mode="off"))
    if weights is not None:
        models[TRAINED] = lambda: load_for_sampling(weights).model
    return models


def random_model(preset: str, **overrides: Any) -> StructMAR:
    """As initialised, but for what starts at zero, which would hide differences: gates and output layers."""
    torch.manual_seed(0)
    model = build_model(preset_config(preset, **overrides)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02, generator=generator)
    return model


def is_structured(model: StructMAR) -> bool:
    return model.config.text_dim > 0


@dataclass(frozen=True)
class World:
    """Conditions of a batch, its orders [B, L], and its noise: a model that is no bare MAR has no labels."""

    model: StructMAR
    text: TextContext | None
    layout: LayoutBatch | None
    labels: Tensor | None
    orders: Tensor

    def __len__(self) -> int:
        return len(self.orders)

    def noise(self, iteration: int, num_draws: int, num_tokens: int) -> Tensor:
        """[S + 1, B, p, C], the same for all that ask for as many."""
        return _noise(iteration, (num_draws, len(self), num_tokens, self.model.config.token_dim))

    def step_noise(self, iteration: int, step: HeadStep, num_tokens: int) -> Tensor:
        """The same, as our sampler asks for it; of a discrete head what it draws."""
        if isinstance(step, DiffusionStep):
            return self.noise(iteration, len(step.times) + 1, num_tokens)
        return step.draw_noise([torch.Generator().manual_seed(iteration)] * len(self), num_tokens)


@cache
def _noise(iteration: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(iteration))


def build_world(model: StructMAR, batch_size: int, group_size: int = 1, num_objects: int = NUM_OBJECTS) -> World:
    """batch_size: images, `group_size` of each prompt. num_objects: boxes of an image."""
    config, prompts = model.config, batch_size // group_size
    generator = torch.Generator().manual_seed(1)
    orders = sample_orders(batch_size, math.prod(config.unit_grid()), [generator])
    if not is_structured(model):
        labels = (torch.arange(prompts) % config.class_num).repeat_interleave(group_size)
        return World(model, None, None, labels, orders)
    states = [torch.randn(NUM_TEXT, config.text_dim, generator=generator) for _ in range(prompts)]
    corners = 0.7 * torch.rand(num_objects, 2, generator=generator)
    boxes = torch.cat([corners, corners + 0.25], dim=1)
    layout = Layout(boxes, torch.arange(num_objects) % config.num_categories)
    batch = LayoutBatch.collate([layout] * prompts, config.max_objects)
    return World(model, TextContext.collate(states).repeated(group_size), batch.repeated(group_size), None, orders)
