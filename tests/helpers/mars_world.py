"""A whole tiny MARS in a folder: language model, tokenizer of images and trained weights, random but not trivial."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from models.frozen.causal_lm import open_causal_lm
from models.frozen.codec import load_codec
from models.mars.identity import MarsIdentity
from models.mars.model import Mars, MarsConfig
from tests.helpers.language_models import moved
from tests.helpers.lm_files import write_lm
from tests.helpers.vq_file import TINY_VQ, write_vq
from util.checkpoint import save_atomic
from util.names import MARS_ENTRY

GRID = (4, 4)
SIDE = GRID[0] * 2  # pixels, by the tokenizer's stride
MAX_TOKENS = 24


@dataclass(frozen=True)
class MarsWorld:
    root: Path

    @property
    def lm(self) -> Path:
        return self.root / "lm"

    @property
    def vq(self) -> Path:
        return self.root / "vq.pt"

    @property
    def checkpoint(self) -> Path:
        return self.root / "mars.pth"

    def flags(self, resume: Path | None = None) -> list[str]:
        frozen = ["--lm_path", str(self.lm), "--vae_path", str(self.vq), "--device", "cpu"]
        return ["--resume", str(resume or self.checkpoint), *frozen]


def write_mars(root: Path, **options: Any) -> MarsWorld:
    """What a training checkpoint says of its weights, without what continues a run."""
    world = MarsWorld(root)
    write_lm(world.lm)
    write_vq(world.vq, TINY_VQ)
    model, identity = tiny_model(world)
    content = {"model": model.visual_state(), "model_ema": {}, "step": 7, MARS_ENTRY: identity.as_dict(), **options}
    save_atomic(content, world.checkpoint)
    return world


def tiny_model(world: MarsWorld, config: MarsConfig | None = None, stage: str = "joint") -> tuple[Mars, MarsIdentity]:
    base, codec = open_causal_lm(world.lm, torch.float32), load_codec(world.vq)
    config = config or MarsConfig(TINY_VQ.codebook_size, GRID)
    model = moved(Mars(base.lm, config, torch.Generator().manual_seed(0)))
    return model, MarsIdentity(base.id, base.model_type, config, codec.id, MAX_TOKENS, stage)


def write_upscaler(world: MarsWorld, path: Path, low_grid: tuple[int, int] = GRID) -> Path:
    """Weights that make pictures of `low_grid` codes twice as large."""
    larger = (2 * low_grid[0], 2 * low_grid[1])
    model, identity = tiny_model(world, MarsConfig(TINY_VQ.codebook_size, larger, low_grid=low_grid), "upscale")
    state = {"model": model.visual_state(), "model_ema": {}, "step": 9, MARS_ENTRY: identity.as_dict()}
    save_atomic(state, path)
    return path
