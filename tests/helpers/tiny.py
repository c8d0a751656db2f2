"""A whole tiny world in a folder: VAE, CLIP text model and weights in the real formats, random but not trivial."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModel

from engine.checkpoint.identity import Identity
from engine.checkpoint.resume import checkpoint_content
from engine.train.state import Position, TrainState
from models.frozen.text import ClipTextEncoder
from models.frozen.vae import LatentCodec, VaeConfig, build_autoencoder, ldm_checkpoint
from models.structmar import StructMAR, StructMARConfig
from models.weights import select_trainable
from tests.helpers.clip_files import text_settings, write_tokenizer
from util.checkpoint import save_atomic, save_safetensors_atomic
from util.ema import Ema
from util.types import Category

CATEGORIES = (Category(1, "person"), Category(18, "dog"), Category(37, "sports ball"))
VAE = VaeConfig((8, 16, 24), 1, 4, encoder_attention=False, mid_attention=True, norm_num_groups=4)
CONFIG = StructMARConfig(
    img_size=32,
    vae_stride=4,
    vae_embed_dim=4,
    encoder_embed_dim=32,
    encoder_depth=2,
    encoder_num_heads=2,
    decoder_embed_dim=32,
    decoder_depth=2,
    decoder_num_heads=2,
    class_num=5,
    buffer_size=8,
    diffloss_d=2,
    diffloss_w=32,
    num_categories=len(CATEGORIES),
    max_objects=4,
    text_dim=16,
)
MAR_CONFIG = StructMARConfig(**CONFIG.to_dict() | {"num_categories": 0, "text_dim": 0, "rope_mode": "off"})


@dataclass(frozen=True)
class World:
    root: Path

    @property
    def vae(self) -> Path:
        return self.root / "vae.ckpt"

    @property
    def clip(self) -> Path:
        return self.root / "clip"

    @property
    def checkpoint(self) -> Path:
        return self.root / "run" / "checkpoint-last.pth"

    @property
    def mar(self) -> Path:
        return self.root / "mar.safetensors"

    @property
    def layout(self) -> Path:
        return self.root / "layout.json"

    def frozen_flags(self) -> list[str]:
        return ["--vae_path", str(self.vae), "--clip_path", str(self.clip)]


def shaken(module: torch.nn.Module, seed: int, std: float = 0.15) -> None:
    """Random values everywhere: zero-initialised gates and heads would hide what is not wired."""
    draws = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=draws), alpha=std)


def write_world(root: Path) -> World:
    """Writes every file of a world. The checkpoint's raw and averaged weights differ."""
    world = World(root)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_atomic(ldm_checkpoint(build_autoencoder(VAE), 0.5, torch.float32), world.vae)
        world.clip.mkdir()
        text_model = CLIPTextModel(CLIPTextConfig(**text_settings(write_tokenizer(world.clip))))
        shaken(text_model, 1)
        text_model.save_pretrained(world.clip)
        write_checkpoint(world, world.checkpoint)
        backbone = StructMAR(MAR_CONFIG)
        shaken(backbone, 2)
        save_safetensors_atomic(backbone.state_dict(), world.mar)
    objects = [
        {"label": "dog", "bbox": [0.1, 0.3, 0.5, 0.9]},
        {"label": "sports ball", "bbox": [0.6, 0.1, 0.9, 0.4]},
    ]
    entries = [{"prompt": "a dog and a ball", "objects": objects}, {"prompt": "a red dog", "objects": []}]
    world.layout.write_text(json.dumps(entries))
    return world


def write_checkpoint(world: World, path: Path, config: StructMARConfig = CONFIG, stage: str = "full") -> None:
    """A training checkpoint after 7 steps."""
    model = StructMAR(config)
    shaken(model, 3)
    trainable = select_trainable(model, stage)
    ema = Ema(trainable, 0.5)
    shaken(model, 4, std=0.05)
    ema.update()
    optimizer = torch.optim.AdamW(trainable.values())
    categories = CATEGORIES[: config.num_categories]
    text_id = ClipTextEncoder.load(world.clip).id if config.text_dim else ""
    identity = Identity(config, LatentCodec.load(world.vae).id, 0.5, text_id, categories)
    state = TrainState(model, model, trainable, optimizer, ema)
    save_atomic(checkpoint_content(state, Position(2, 7, 0), stage, identity, {}, 4), path)
