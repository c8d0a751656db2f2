"""StructMAR as a component of a diffusers pipeline: one folder with config.json and a safetensors file.

The class's module path is written into the pipeline's model_index.json: saved folders need it to stay.
"""

from __future__ import annotations

import math
from typing import Any

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from models.build import build_model
from models.config import StructMARConfig
from models.structmar import StructMAR


class StructMARTransformer(ModelMixin, ConfigMixin):
    """A thin shell: `model` is the StructMAR. architecture: fields of its config; those left out have the defaults."""

    ignore_for_config = ["model"]  # noqa: RUF012 - diffusers reads it from the class

    @register_to_config
    def __init__(self, architecture: dict[str, Any], model: StructMAR | None = None) -> None:
        super().__init__()
        self.model = (
            build_model(StructMARConfig.from_dict(architecture, "transformer/config.json")) if model is None else model
        )

    @classmethod
    def around(cls, model: StructMAR) -> StructMARTransformer:
        """The shell of a model that is there already (compiled, sharded or in training): nothing is copied."""
        values = model.config.to_dict().items()
        finite = {name: value for name, value in values if value != math.inf}  # JSON has no infinity; it is the default
        return cls(architecture=finite, model=model)
