"""A model of codes beside the tiny world, and its tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.checkpoint.identity import Identity
from engine.checkpoint.resume import checkpoint_content
from engine.train.state import Position, TrainState
from models.frozen.codec import load_codec
from models.frozen.text import ClipTextEncoder
from models.frozen.vq import VqConfig
from models.structmar import StructMAR
from models.weights import select_trainable
from tests.helpers.family import family_config
from tests.helpers.tiny import CATEGORIES, World, shaken
from tests.helpers.vq_file import write_vq
from util.checkpoint import save_atomic
from util.ema import Ema


def write_codes(world: World) -> tuple[Path, Path]:
    """A checkpoint of a model of codes, and its tokenizer."""
    vq = write_vq(world.root / "vq.pt", VqConfig((8, 16, 16), 1, 8, 20, 4, norm_num_groups=4))
    config = family_config(num_categories=len(CATEGORIES), text_dim=16)
    torch.manual_seed(0)
    model = StructMAR(config)
    shaken(model, 3)
    trainable = select_trainable(model, "full")
    ema = Ema(trainable, 0.5)
    identity = Identity(config, load_codec(vq).id, 1.0, ClipTextEncoder.load(world.clip).id, CATEGORIES)
    state = TrainState(model, model, trainable, torch.optim.AdamW(trainable.values()), ema)
    save_atomic(checkpoint_content(state, Position(2, 7, 0), "full", identity, {}, 4), world.root / "codes.pth")
    return world.root / "codes.pth", vq
