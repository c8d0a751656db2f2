"""The public MAR code's outputs on fixed inputs (tests/data/mar_tiny/meta.json), and a model on the same weights."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from models.structmar import StructMAR, StructMARConfig
from models.weights import load_mar_weights

DATA = Path(__file__).parents[1] / "data" / "mar_tiny"


@lru_cache
def meta() -> dict[str, Any]:
    return json.loads((DATA / "meta.json").read_text())


@lru_cache
def tensors() -> dict[str, Tensor]:
    return load_file(DATA / "tensors.safetensors")


@lru_cache
def weights() -> dict[str, Tensor]:
    return load_file(DATA / "weights.safetensors")


def tiny_config(**overrides: Any) -> StructMARConfig:
    values = {name: value for name, value in meta()["config"].items() if name != "num_sampling_steps"}
    return StructMARConfig(**({"max_objects": 4, "rope_mode": "off"} | values | overrides))


def tiny_model(**overrides: Any) -> StructMAR:
    """On the reference's trained weights: zero-initialised heads would let any parity test pass."""
    torch.manual_seed(0)
    model = StructMAR(tiny_config(**overrides))
    load_mar_weights(model, weights(), "mar_tiny")
    return model.eval()


STRUCTURED: dict[str, Any] = {"num_categories": 5, "text_dim": 12, "rope_mode": "gated"}


def relative_error(ours: Tensor, reference: Tensor) -> float:
    return float(((ours - reference).abs().max() / reference.abs().max()).detach())
