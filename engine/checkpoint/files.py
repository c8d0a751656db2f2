"""Reads any file of weights: a training checkpoint, an exported file, MAR's checkpoint or MAR's bare weights.

A training checkpoint is a dictionary of plain values and whole tensors (the same file under one process, DDP and FSDP):
    format, model, model_ema (what trains), optimizer (state by parameter name), epoch, step, batch_in_epoch,
    global_batch, args and the entries of its `Identity`; of stage 3 (grpo) also reference (what trains, as it was at
    the start) and held_out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.checkpoint.identity import Identity
from models.weights import is_mar_state
from util.checkpoint import load_plain, resolve_checkpoint, safetensors_metadata

CHECKPOINT_FORMAT = 1
MAR_STAGE = "mar"
_NEEDED = ("stage", "model", "model_ema", "optimizer", "epoch", "step", "batch_in_epoch", "global_batch", "args",
           "config", "vae", "text_encoder", "categories")  # fmt: skip


def read_weights_file(path: str | Path) -> dict[str, Any]:
    """The file's content as one kind of dictionary: at least stage, model and model_ema ({} where there is none).

    Our files also have the entries of their `Identity` (`identity_of`), exported ones `weights`; MAR's have none of it
    and the stage 'mar'. Tensors keep the type they have in the file.
    Raises FileNotFoundError or ValueError naming the file for anything else.
    """
    file = resolve_checkpoint(path)
    loaded = load_plain(file, mmap=True)
    if "format" in loaded:
        return _checked(loaded, file)
    if file.suffix == ".safetensors":
        metadata = safetensors_metadata(file)
        if "config" in metadata or not is_mar_state(loaded):
            identity = Identity.from_metadata(metadata, file)
            return {"model": loaded, "model_ema": {}, "weights": identity.weights, **identity.to_dict()}
    weights = loaded.get("model", loaded)
    if not isinstance(weights, dict) or not is_mar_state(weights):
        raise ValueError(
            f"{file} is neither a StructMAR checkpoint nor MAR's weights; it holds {sorted(map(str, loaded))[:6]}"
        )
    averaged = loaded.get("model_ema", {}) if weights is not loaded else {}
    return {"stage": MAR_STAGE, "model": weights, "model_ema": averaged}


def read_identity(path: str | Path) -> Identity | None:
    """What a file says its weights were made for, without reading them; None for MAR's own. Errors as above."""
    file = resolve_checkpoint(path)
    if file.suffix != ".safetensors":
        return identity_of(read_weights_file(file), file)
    metadata = safetensors_metadata(file)
    return Identity.from_metadata(metadata, file) if "config" in metadata else None


def identity_of(state: Mapping[str, Any], source: str | Path, use_ema: bool = True) -> Identity | None:
    """What the weights of `read_weights_file` were made for; None for MAR's own files, which do not say."""
    if "config" not in state:
        return None
    weights = state.get("weights", "ema" if use_ema and state["model_ema"] else "raw")
    return Identity.from_dict(state, source, weights)


def _checked(state: dict[str, Any], file: Path) -> dict[str, Any]:
    if state["format"] != CHECKPOINT_FORMAT:
        raise ValueError(f"{file} has checkpoint format {state['format']}, this version reads {CHECKPOINT_FORMAT}")
    missing = [name for name in _NEEDED if name not in state]
    if missing:
        raise ValueError(f"{file} is a checkpoint without {missing}")
    return state
