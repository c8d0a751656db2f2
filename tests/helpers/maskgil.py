"""What the public code of MaskGIL, LlamaGen, Halton-MaskGIT and Chameleon gives (`shared/reference/maskgil`)."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from models.config import StructMARConfig
from tests.helpers.weights_rule import deterministic_tensor


class MaskGilReference:
    """tensors: inputs and outputs. weights: of a small module, by its public names."""

    def __init__(self, shared: Path) -> None:
        folder = shared / "reference" / "maskgil"
        self.tensors: dict[str, Tensor] = load_file(folder / "gpt_tiny.safetensors")
        self.manifest = json.loads((folder / "manifest.json").read_text())

    def weights(self, module: str) -> dict[str, Tensor]:
        return {
            name: deterministic_tensor(name, tuple(shape)) for name, shape in self.manifest["blocks"][module].items()
        }


def maskgil_config(**overrides: object) -> StructMARConfig:
    """The released architecture at width 64: pre-norm, no norm of queries and keys, 32 codes, 10 classes, 16 x 16."""
    values: dict[str, object] = {
        "img_size": 64, "vae_stride": 4, "vae_embed_dim": 1, "trunk": "single", "head": "discrete",
        "codebook_size": 32, "encoder_embed_dim": 64, "encoder_depth": 0, "encoder_num_heads": 4,
        "decoder_embed_dim": 64, "decoder_depth": 2, "decoder_num_heads": 4, "class_num": 10, "buffer_size": 1,
        "max_objects": 1, "norm": "rms", "mlp": "swiglu", "linear_bias": False, "learned_pos": False,
        "rope_mode": "full", "rope_axes": "yx", "loss_on": "all",
    }  # fmt: skip
    return StructMARConfig.from_dict(values | overrides)
