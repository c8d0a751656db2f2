"""What turns scenes into images: the trained model together with the frozen parts it was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.identity import Identity
from engine.checkpoint.load import load_for_sampling, require_same_frozen
from models.frozen.text import TextEncoder
from models.frozen.vae import LatentCodec
from models.structmar import StructMAR
from util.types import Category


@dataclass(frozen=True)
class Pipeline:
    """Everything loaded and checked against one another, in evaluation mode. source: the weights' path."""

    source: str
    model: StructMAR
    identity: Identity
    codec: LatentCodec
    text_encoder: TextEncoder

    def describe(self) -> dict[str, Any]:
        """Which weights these are, for what is written beside images."""
        checkpoint = {"path": self.source, "stage": self.identity.stage, "step": self.identity.step}
        frozen = {"vae": self.codec.id, "latent_scale": self.codec.latent_scale, "text_encoder": self.text_encoder.id}
        return {**checkpoint, "weights": self.identity.weights, **frozen}


def load_pipeline(
    path: str | Path,
    vae_path: str | Path,
    clip_path: str | Path,
    device: torch.device,
    use_ema: bool = True,
    allow_other_frozen: bool = False,
) -> Pipeline:
    """Raises FileNotFoundError or ValueError naming the file that is missing or does not fit the weights."""
    loaded = load_for_sampling(path, device, use_ema=use_ema)
    model, identity = loaded.model, loaded.identity
    codec = LatentCodec.load(vae_path, device, identity.latent_scale)
    require_same_frozen("VAE", vae_path, codec.id, identity.vae_id, allow_other_frozen)
    require_fitting_codec(codec, str(vae_path), model)
    text_encoder = TextEncoder.load(clip_path, device)
    require_same_frozen("text encoder", clip_path, text_encoder.id, identity.text_encoder_id, allow_other_frozen)
    if text_encoder.dim != identity.config.text_dim:
        raise ValueError(
            f"text encoder {clip_path} has width {text_encoder.dim}, the checkpoint {identity.config.text_dim}"
        )
    return Pipeline(str(path), model, identity, codec, text_encoder)


def require_fitting_codec(codec: LatentCodec, path: str, model: StructMAR) -> None:
    """Raises ValueError naming both sizes if the VAE's latents are not the model's."""
    found, expected = (codec.stride, codec.latent_channels), (model.config.vae_stride, model.config.vae_embed_dim)
    if found != expected:
        raise ValueError(f"VAE {path} has (stride, latent channels) {found}, the model {expected}")


def require_same_categories(found: Sequence[Category], trained: Sequence[Category], where: str) -> None:
    """Raises ValueError naming both lists if a dataset's categories are not those the weights were trained with."""
    if tuple(found) != tuple(trained):
        raise ValueError(
            f"{where} has the categories {_names(found)}, but the checkpoint was trained with {_names(trained)}"
        )


def _names(categories: Sequence[Category]) -> str:
    names = [f"{category.id} {category.name}" for category in categories]
    return ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")
