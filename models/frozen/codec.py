"""Whichever image tokenizer a path holds: a KL autoencoder, or one of discrete codes."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import torch
from diffusers import AutoencoderKL

from models.frozen.codes import CodeCodec
from models.frozen.lfq import LfqAutoencoder, is_lfq_state, lfq_from_state
from models.frozen.published import read_tokenizer_file
from models.frozen.vae import LatentCodec, config_of
from models.frozen.vq import VqAutoencoder, is_llamagen_state, vq_from_folder, vq_from_state

Codec: TypeAlias = LatentCodec | CodeCodec
Autoencoder: TypeAlias = AutoencoderKL | VqAutoencoder | LfqAutoencoder
"""What a codec's `autoencoder` may be."""


def load_codec(path: str | Path, device: torch.device | str = "cpu", latent_scale: float | None = None) -> Codec:
    """The codec of a file (of LDM, LlamaGen or Open-MAGVIT2, told by the tensors' names) or of a folder of diffusers.

    latent_scale: of a KL autoencoder; None takes the file's own entry, or MAR's. Codes have none but 1.
    Raises FileNotFoundError if there is no such file; ValueError naming the file and what is wrong with it.
    """
    if Path(path).is_dir():
        _require_no_scale(latent_scale, path)
        return vq_from_folder(path, device)
    state, entries = read_tokenizer_file(path)
    is_lfq = is_lfq_state(state)
    if not (is_lfq or is_llamagen_state(state)):
        return LatentCodec.from_state(state, entries, path, device, latent_scale)
    _require_no_scale(latent_scale, path)
    return lfq_from_state(state, path, device) if is_lfq else vq_from_state(state, entries, path, device)


def codec_around(autoencoder: Autoencoder, latent_scale: float, file_id: str) -> Codec:
    """The codec of networks that are there already. Raises ValueError for codes with another scale than 1."""
    if isinstance(autoencoder, AutoencoderKL):
        return LatentCodec(autoencoder, config_of(autoencoder), latent_scale, file_id)
    _require_no_scale(latent_scale, "the pipeline's autoencoder")
    return CodeCodec(autoencoder, file_id)


def _require_no_scale(latent_scale: float | None, source: str | Path) -> None:
    if latent_scale not in (None, 1):
        raise ValueError(f"asked for latent_scale {latent_scale}, but {source} makes codes, which have no scale but 1")
