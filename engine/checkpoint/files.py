"""Reads any file of weights: a training checkpoint, an exported file, MAR's or MaskGIL's checkpoint or bare weights.

A training checkpoint is a dictionary of plain values and whole tensors (the same file under one process, DDP and FSDP):
    format, model, model_ema (what trains), optimizer (state by parameter name), epoch, step, images_in_epoch (files of
    before: batch_in_epoch alone, batches of global_batch images), args and the entries of its `Identity`; of guidance
    distillation and of stage 3 also reference (what trains, as it was at the start); of stage 3 also held_out; with
    --keep_best also best; with pictures of several sizes also buckets (engine/data/buckets.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.checkpoint.content import check_content
from engine.checkpoint.identity import Identity
from engine.checkpoint.kept import way_back
from models.maskgil_names import from_maskgil, is_maskgil_state
from models.weights import is_mar_state
from util.checkpoint import load_plain, resolve_checkpoint, safetensors_metadata
from util.names import MARS_ENTRY

MAR_STAGE = "mar"


def read_weights_file(path: str | Path) -> dict[str, Any]:
    """The file's content as one kind of dictionary: at least stage, model and model_ema ({} where there is none).

    Our files also have the entries of their `Identity` (`identity_of`), exported ones `weights`; MAR's have none of it
    and the stage 'mar', and so have MaskGIL's, whose tensors get our names. Tensors keep the type they have in the
    file. Checksums are compared. Raises FileNotFoundError or ValueError naming the file for anything else and, where it
    is a run's checkpoint, the newest whole one beside it.
    """
    file = resolve_checkpoint(path)
    try:
        return _read(file)
    except ValueError as error:
        raise ValueError(f"{error}{way_back(file, _read)}") from error


def _read(file: Path, is_trusted: bool = False) -> dict[str, Any]:
    """is_trusted: without comparing checksums."""
    loaded = load_plain(file, mmap=True, is_trusted=is_trusted)
    if MARS_ENTRY in loaded:
        raise _of_mars(file)
    if "format" in loaded:
        check_content(loaded, file)
        return loaded
    if is_maskgil_state(bare := loaded.get("model", loaded)):
        return {"stage": MAR_STAGE, "model": from_maskgil(bare, str(file)), "model_ema": {}}
    if file.suffix == ".safetensors":
        metadata = safetensors_metadata(file)
        if MARS_ENTRY in metadata:
            raise _of_mars(file)
        if "config" in metadata or not is_mar_state(loaded):
            identity = Identity.from_metadata(metadata, file)
            return {"model": loaded, "model_ema": {}, "weights": identity.weights, **identity.to_dict()}
    weights = loaded.get("model", loaded)
    if not isinstance(weights, dict) or not is_mar_state(weights):
        raise ValueError(
            f"{file} is neither a StructMAR checkpoint nor MAR's or MaskGIL's weights; it holds "
            f"{sorted(map(str, loaded))[:6]}"
        )
    averaged = loaded.get("model_ema", {}) if weights is not loaded else {}
    return {"stage": MAR_STAGE, "model": weights, "model_ema": averaged}


def _of_mars(file: Path) -> ValueError:
    return ValueError(f"{file} holds MARS, which draws and describes with its language model: give it by --lm_path")


def read_identity(path: str | Path) -> Identity | None:
    """What a file says its weights were made for, without reading them (or their checksums); None for MAR's own.
    Errors as above."""
    file = resolve_checkpoint(path)
    if file.suffix != ".safetensors":
        return identity_of(_read(file, is_trusted=True), file)
    metadata = safetensors_metadata(file)
    if MARS_ENTRY in metadata:
        raise _of_mars(file)
    return Identity.from_metadata(metadata, file) if "config" in metadata else None


def identity_of(state: Mapping[str, Any], source: str | Path, use_ema: bool = True) -> Identity | None:
    """What the weights of `read_weights_file` were made for; None for MAR's own files, which do not say."""
    if "config" not in state:
        return None
    weights = state.get("weights", "ema" if use_ema and state["model_ema"] else "raw")
    return Identity.from_dict(state, source, weights)
