"""Weights for sampling: from a training checkpoint, an exported file, or MAR's own; and the export itself."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint.identity import WeightsInfo
from engine.checkpoint.resume import read_weights_file
from models.structmar import StructMAR, StructMARConfig
from models.weights import is_mar_state, load_mar_weights, load_structmar_weights
from util.checkpoint import load_plain, resolve_checkpoint, safetensors_metadata, save_safetensors_atomic
from util.types import Category

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """In evaluation mode, on its device."""

    model: StructMAR
    info: WeightsInfo


def load_for_sampling(path: str | Path, device: torch.device | str = "cpu", use_ema: bool = True) -> LoadedModel:
    """A model with the weights of a training checkpoint (or the checkpoint-last.pth of a folder) or an exported file.

    use_ema: the averaged weights of a training checkpoint; an exported file holds one set, chosen when it was written.
    Raises FileNotFoundError, or ValueError naming the file, for anything else; MAR's own: `load_mar_for_sampling`.
    """
    state, info = read_weights(path, use_ema)
    model = StructMAR(info.config)
    load_structmar_weights(model, state, str(path)).log(logger)
    logger.info(f"{path}: {info.weights} weights of stage {info.stage} after {info.step} steps")
    return LoadedModel(model.to(device).eval(), info)


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
    if "config" in state:
        config = StructMARConfig.from_dict(state["config"])
    averaged = state["model_ema"] if use_ema else {}
    model = StructMAR(config)
    report = load_mar_weights(model, {**state["model"], **averaged}, str(path))
    if "class_emb.weight" in report.ignored:
        found = state["model"]["class_emb.weight"].shape[0]
        raise ValueError(f"{path} has {found} classes, the model {config.class_num}: pass --class_num {found}")
    report.log(logger)
    logger.info(f"{path}: {'ema' if averaged else 'raw'} weights, class-conditional")
    return model.to(device).eval()


def read_weights(path: str | Path, use_ema: bool = True) -> tuple[dict[str, Tensor], WeightsInfo]:
    """The tensors to sample with and what they were made for. Errors as `load_for_sampling`."""
    file = resolve_checkpoint(path)
    if file.suffix == ".safetensors":
        state = load_plain(file)
        _refuse_backbone(state, file)
        info = WeightsInfo.from_metadata(safetensors_metadata(file), file)
        if not use_ema and info.weights == "ema":
            raise ValueError(f"{file} holds the ema weights only: --no_ema needs the training checkpoint")
        return state, info
    checkpoint = read_weights_file(file)
    _refuse_backbone(checkpoint["model"], file)
    averaged = checkpoint["model_ema"] if use_ema else {}
    info = WeightsInfo(
        config=StructMARConfig.from_dict(checkpoint["config"]),
        categories=tuple(Category(entry["id"], entry["name"]) for entry in checkpoint["categories"]),
        vae_id=checkpoint["vae"]["id"],
        latent_scale=checkpoint["vae"]["latent_scale"],
        text_encoder_id=checkpoint["text_encoder"]["id"],
        stage=checkpoint["stage"],
        step=checkpoint["step"],
        weights="ema" if averaged else "raw",
        reward_detector_id=checkpoint.get("reward_detector"),
    )
    return {**checkpoint["model"], **averaged}, info


def export_weights(path: str | Path, output: str | Path, dtype: str = "fp32", use_ema: bool = True) -> WeightsInfo:
    """Writes the weights of a training checkpoint as one safetensors file for inference, atomically.

    Raises ValueError if they do not fit their own config, or are not finite in `dtype`.
    """
    if Path(output).suffix != ".safetensors":
        raise ValueError(f"the exported file must end in .safetensors, got {output}")
    state, info = read_weights(path, use_ema)
    with torch.device("meta"):
        load_structmar_weights(StructMAR(info.config), state, str(path))  # only checks names and shapes
    tensors = {name: tensor.to(DTYPES[dtype]) for name, tensor in state.items()}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{path}: {name} is not finite in {dtype}")
    save_safetensors_atomic(tensors, output, info.to_metadata())
    return info


def require_same_frozen(kind: str, path: str | Path, found: str, expected: str, allow_other: bool) -> None:
    """Refuses a VAE or text encoder other than the one the weights were trained with, unless `allow_other`."""
    if found == expected:
        return
    message = f"{kind} {path} has id {found}, but the checkpoint was trained with {expected}"
    if not allow_other:
        raise ValueError(f"{message}; pass --allow_other_frozen to sample with it anyway")
    logger.warning(f"{message}; used anyway (--allow_other_frozen)")


def _refuse_backbone(state: dict[str, Tensor], file: Path) -> None:
    if is_mar_state(state):
        raise ValueError(f"{file} holds MAR's weights, without text and layout parts: sample them with --class_label")
