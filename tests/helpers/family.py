"""Tiny models of every kind: two trunks, two heads, patches of one cell or several."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.config import StructMARConfig
from models.structmar import StructMAR
from tests.helpers.tiny import shaken

CODEBOOK = 20
SIZES: dict[str, Any] = {"img_size": 32, "vae_stride": 4, "encoder_embed_dim": 32, "encoder_depth": 2,
                         "encoder_num_heads": 2, "decoder_embed_dim": 32, "decoder_depth": 2, "decoder_num_heads": 2,
                         "class_num": 5, "buffer_size": 8, "max_objects": 4, "diffloss_d": 2,
                         "diffloss_w": 32}  # fmt: skip
TRUNKS: dict[str, dict[str, Any]] = {
    "mae": {"trunk": "mae"},
    "single": {"trunk": "single", "encoder_depth": 0, "learned_pos": False, "rope_mode": "full"},
}
HEADS: dict[str, dict[str, Any]] = {
    "diffusion": {"head": "diffusion", "vae_embed_dim": 4},
    "discrete": {"head": "discrete", "vae_embed_dim": 1, "codebook_size": CODEBOOK, "code_dim": 8},
}
LLAMA: dict[str, Any] = {"norm": "rms", "mlp": "swiglu", "linear_bias": False, "norm_position": "res_post",
                         "qk_norm": "head_rms", "rope_axes": "yx"}  # fmt: skip


def family_config(trunk: str = "single", head: str = "discrete", **overrides: Any) -> StructMARConfig:
    return StructMARConfig(**SIZES | TRUNKS[trunk] | HEADS[head] | overrides)


def family_model(trunk: str = "single", head: str = "discrete", std: float = 0.15, **overrides: Any) -> StructMAR:
    """In evaluation mode, with random values where weights start at zero."""
    torch.manual_seed(0)
    model = StructMAR(family_config(trunk, head, **overrides)).eval()
    shaken(model, 1, std)
    return model


def some_latents(model: StructMAR, batch_size: int = 2, seed: int = 0) -> Tensor:
    """Codes or continuous latents of the model's own grid: [B, C, h, w]."""
    config, draws = model.config, torch.Generator().manual_seed(seed)
    rows, columns = (side * config.patch_size for side in config.grid)
    shape = (batch_size, config.vae_embed_dim, rows, columns)
    if config.head == "discrete":
        return torch.randint(0, config.codebook_size, shape, generator=draws).float()
    return torch.randn(shape, generator=draws)
