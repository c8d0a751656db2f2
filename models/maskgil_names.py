"""MaskGIL's own weights under our names (arXiv:2507.13032; its blocks are LlamaGen's, arXiv:2406.06525).

One table of theirs, `tok_emb`, holds the K codes, the hidden code, the classes and the dropped class, in this order:
here these are `z_proj`, `mask_token`, `class_emb` and `fake_latent`. The last row of their output scores the hidden
code, which is never drawn: it is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

BLOCKS = {
    "attention.wqkv": "attn.qkv",
    "attention.wo": "attn.proj",
    "feed_forward.w1": "mlp.fc1_g",
    "feed_forward.w3": "mlp.fc1_x",
    "feed_forward.w2": "mlp.fc2",
    "attention_norm": "norm1",
    "ffn_norm": "norm2",
}


def is_maskgil_state(state: Mapping[str, Any]) -> bool:
    return "tok_emb.weight" in state and "output.weight" in state


def renamed_block(name: str) -> str:
    """A parameter of a block by our name; one that is unknown keeps its own, which no model has."""
    part, _, leaf = name.rpartition(".")
    return f"{BLOCKS.get(part, part)}.{leaf}"


def from_maskgil(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The weights under our names. Raises ValueError naming the source and both sizes if the tables do not belong
    together."""
    table, output = state["tok_emb.weight"], state["output.weight"]  # [K + C + 2, D], [K + 1, D]
    num_codes = len(output) - 1
    if num_codes < 1 or len(table) < num_codes + 3:
        raise ValueError(
            f"{source}: tok_emb.weight has {len(table)} rows, too few for the {num_codes} codes that output.weight "
            "scores, a hidden one, a class and none"
        )
    renamed = {
        "z_proj.codes.weight": table[:num_codes],
        "mask_token": table[num_codes].view(1, 1, -1),
        "class_emb.weight": table[num_codes + 1 : -1],
        "fake_latent": table[-1:],
        "code_head.out.weight": output[:-1],
    }
    for name, tensor in state.items():
        if name.startswith("layers."):
            _, index, rest = name.split(".", 2)
            renamed[f"decoder_blocks.{index}.{renamed_block(rest)}"] = tensor
        elif name == "norm.weight":
            renamed["decoder_norm.weight"] = tensor
        elif name not in ("tok_emb.weight", "output.weight"):
            renamed[name] = tensor  # unknown: the loader says so
    return renamed
