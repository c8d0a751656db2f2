"""A tiny planner beside the tiny world: random weights in a real file."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.plan.files import PlannerIdentity, save_planner
from models.frozen.text import ClipTextEncoder
from models.planner import Planner, PlannerConfig
from tests.helpers.tiny import CATEGORIES, World, shaken
from util.types import Category


def write_planner(
    path: Path, world: World, categories: tuple[Category, ...] = CATEGORIES, text_encoder_id: str | None = None
) -> Path:
    """Places up to six objects of `categories`, more than the world's model draws; reads the world's captions."""
    encoder = ClipTextEncoder.load(world.clip)
    config = PlannerConfig(len(categories), encoder.dim, 6, num_bins=17, width=16, depth=1, num_heads=2)
    identity = PlannerIdentity(config, categories, text_encoder_id or encoder.id)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Planner(config)
    shaken(model, 5)
    model.head.bias.data[config.end] -= 3  # a few boxes before the end
    save_planner(path, identity, model.state_dict(), step=7)
    return path
