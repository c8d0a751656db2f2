"""Weights for sampling: from a training checkpoint, an exported file, or MAR's own; and the export itself."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint.files import identity_of, read_weights_file
from engine.checkpoint.identity import Identity
from models.build import build_model
from models.config import EXPORT_PRECISIONS, StructMARConfig
from models.frozen.base import ImageCodec
from models.sampling.config import SamplingConfig
from models.structmar import StructMAR
from models.weights import is_mar_state, load_mar_weights, load_structmar_weights, require_own_sizes
from util.checkpoint import resolve_checkpoint, save_safetensors_atomic
from util.weights import is_finite, tensor_problem

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """In evaluation mode, on its device."""

    model: StructMAR
    identity: Identity


def load_for_sampling(path: str | Path, device: torch.device | str = "cpu", use_ema: bool = True) -> LoadedModel:
    """A model with the weights of a training checkpoint (or the checkpoint-last.pth of a folder) or an exported file.

    use_ema: the averaged weights of a training checkpoint; an exported file holds one set, chosen when it was written.
    Raises FileNotFoundError, or ValueError naming the file, for anything else; MAR's own: `load_mar_for_sampling`.
    """
    state, identity = read_weights(path, use_ema)
    if is_mar_state(state):
        raise _class_conditional(resolve_checkpoint(path))
    require_own_sizes(identity.config, state, str(path))
    model = build_model(identity.config)
    load_structmar_weights(model, state, str(path)).log(logger)
    logger.info(f"{path}: {identity.weights} weights of stage {identity.stage} after {identity.step} steps")
    return LoadedModel(model.to(device).eval(), identity)


def load_mar_for_sampling(
    path: str | Path, config: StructMARConfig, device: torch.device | str = "cpu", use_ema: bool = True
) -> StructMAR:
    """A class-conditional model with MAR's own weights (`mar_*.safetensors` or MAR's `checkpoint-last.pth`).

    config: the sizes, which MAR's files do not state; a class-conditional checkpoint of ours does, its own are used.
    Raises FileNotFoundError, or ValueError naming the file and what differs.
    """
    state = read_weights_file(path)
    if not is_mar_state(state["model"]):
        raise ValueError(f"{path} does not hold MAR's weights but a StructMAR's: sample it from captions and boxes")
    identity = identity_of(state, path)
    model = build_model(config if identity is None else identity.config)
    averaged = state["model_ema"] if use_ema else {}
    report = load_mar_weights(model, {**state["model"], **averaged}, str(path))
    if "class_emb.weight" in report.ignored:
        found = state["model"]["class_emb.weight"].shape[0]
        raise ValueError(
            f"{path} has {found} classes, the model {model.config.class_num}: pass --class_num {found}"
        )  # fmt: skip
    report.log(logger)
    logger.info(f"{path}: {'ema' if averaged else 'raw'} weights, class-conditional")
    return model.to(device).eval()


def read_weights(path: str | Path, use_ema: bool = True) -> tuple[dict[str, Tensor], Identity]:
    """The tensors to sample with and what they were made for. Raises FileNotFoundError, or ValueError naming the file
    for anything else than a training checkpoint or an exported file."""
    file = resolve_checkpoint(path)
    state = read_weights_file(file)
    identity = identity_of(state, file, use_ema)
    if identity is None:
        raise _class_conditional(file)
    if not use_ema and identity.weights == "ema":
        raise ValueError(f"{file} holds the ema weights only: --no-ema needs the training checkpoint")
    averaged = state["model_ema"] if use_ema else {}
    return {**state["model"], **averaged}, identity


def _class_conditional(file: Path) -> ValueError:
    return ValueError(f"{file} holds MAR's weights, without text and layout parts: sample them with --class_label")


def export_weights(
    path: str | Path,
    output: str | Path,
    dtype: str = "fp32",
    use_ema: bool = True,
    sampling: SamplingConfig | None = None,
) -> Identity:
    """Writes the weights of a training checkpoint as one safetensors file for inference, atomically.

    sampling: replaces what the file says about sampling, which is carried over otherwise.
    Raises ValueError if the weights do not fit their own config, or are not finite in `dtype`.
    """
    if Path(output).suffix != ".safetensors":
        raise ValueError(f"the exported file must end in .safetensors, got {output}")
    state, identity = read_weights(path, use_ema)
    if sampling is not None:
        identity = replace(identity, sampling=sampling)
    require_own_sizes(identity.config, state, str(path))
    for name, tensor in state.items():
        if (problem := tensor_problem(name, tensor)) is not None:
            raise ValueError(f"{path}: {problem}")
    tensors = {name: tensor.to(getattr(torch, EXPORT_PRECISIONS[dtype])) for name, tensor in state.items()}
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise ValueError(f"{path}: {name} is not finite in {dtype}")
    save_safetensors_atomic(tensors, output, identity.to_metadata())
    return identity


def require_same_frozen(kind: str, path: str | Path, found: str, expected: str, allow_other: bool) -> None:
    """Refuses a VAE or text encoder other than the one the weights were trained with, unless `allow_other`."""
    if found == expected:
        return
    message = f"{kind} {path} has id {found}, but the checkpoint was trained with {expected}"
    if not allow_other:
        raise ValueError(f"{message}; --allow_other_frozen (allow_other_frozen=True) samples with it anyway")
    logger.warning(f"{message}; used anyway (--allow_other_frozen)")


def require_fitting_codec(codec: ImageCodec, path: str | Path, config: StructMARConfig) -> None:
    """Raises ValueError naming the field and both sizes if the VAE's latents are not those that the model takes.

    A codebook_size of 0 stands for continuous latents.
    """
    for name, wanted, found in (
        ("vae_stride", config.vae_stride, codec.stride),
        ("codebook_size", config.codebook_size, codec.codebook_size),
        ("vae_embed_dim", config.vae_embed_dim, codec.latent_channels),
    ):
        if wanted != found:
            raise ValueError(f"the model has {name} {wanted}, but the VAE {path} has {found}")
