"""What turns scenes into images: the trained model together with the frozen parts it was trained with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.identity import WeightsInfo
from engine.checkpoint.load import load_for_sampling, require_same_frozen
from engine.checkpoint.resume import Identity
from engine.data.scenes import Scene
from engine.sample.generate import generate_images
from models.frozen.text import TextEncoder
from models.frozen.vae import LatentCodec
from models.sampling.config import SamplingConfig
from models.structmar import StructMAR
from util.images import Picture
from util.types import Category


@dataclass(frozen=True)
class StructMARPipeline:
    """A model and the frozen parts around it, on one device. identity: what the model's weights are made for."""

    model: StructMAR
    codec: LatentCodec
    caption_encoder: TextEncoder
    identity: Identity | None = None

    @staticmethod
    def from_parts(
        model: StructMAR, codec: LatentCodec, caption_encoder: TextEncoder, identity: Identity | None = None
    ) -> StructMARPipeline:
        return StructMARPipeline(model, codec, caption_encoder, identity)

    def draw(
        self,
        scenes: Sequence[Scene],
        config: SamplingConfig,
        seeds: Sequence[int],
        batch_size: int,
        precision: str,
        progress: Callable[[], None] | None = None,
    ) -> list[Picture]:
        """One picture per scene and seed, see `generate_images`."""
        parts = (self.model, self.codec, self.caption_encoder)
        return generate_images(*parts, scenes, config, seeds, batch_size, self.codec.device, precision, progress)


@dataclass(frozen=True)
class Pipeline:
    """Everything loaded and checked against one another, in evaluation mode. source: the weights' path."""

    source: str
    model: StructMAR
    info: WeightsInfo
    codec: LatentCodec
    text_encoder: TextEncoder

    def describe(self) -> dict[str, Any]:
        """Which weights these are, for what is written beside images."""
        checkpoint = {"path": self.source, "stage": self.info.stage, "step": self.info.step}
        frozen = {"vae": self.codec.id, "latent_scale": self.codec.latent_scale, "text_encoder": self.text_encoder.id}
        return {**checkpoint, "weights": self.info.weights, **frozen}


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
    model, info = loaded.model, loaded.info
    codec = LatentCodec.load(vae_path, device, info.latent_scale)
    require_same_frozen("VAE", vae_path, codec.id, info.vae_id, allow_other_frozen)
    require_fitting_codec(codec, str(vae_path), model)
    text_encoder = TextEncoder.load(clip_path, device)
    require_same_frozen("text encoder", clip_path, text_encoder.id, info.text_encoder_id, allow_other_frozen)
    if text_encoder.dim != info.config.text_dim:
        raise ValueError(
            f"text encoder {clip_path} has width {text_encoder.dim}, the checkpoint {info.config.text_dim}"
        )
    return Pipeline(str(path), model, info, codec, text_encoder)


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
