"""From a config to a model: the one place that says which class a config stands for."""

from __future__ import annotations

from models.config import StructMARConfig
from models.structmar import StructMAR


def build_model(config: StructMARConfig) -> StructMAR:
    """A model with initial weights, drawn from torch's global generator, on the current default device."""
    return StructMAR(config)
