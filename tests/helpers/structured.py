"""A small StructMAR on trained weights with every new part switched on, and something to condition it on."""

from __future__ import annotations

import torch
from torch import Tensor

from models.masking import mask_from_orders, sample_orders
from models.structmar import StructMAR
from models.weights import part_of
from tests.helpers import reference
from util.types import Layout, LayoutBatch, TextContext


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_layout(max_objects: int = 4) -> LayoutBatch:
    first = Layout(torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.55, 0.2, 0.95, 0.9]]), torch.tensor([1, 3]))
    second = Layout(torch.tensor([[0.3, 0.4, 0.31, 0.41]]), torch.tensor([2]))
    return LayoutBatch.collate([first, second], max_objects)


def some_text(dim: int = 12) -> TextContext:
    return TextContext.collate(
        [torch.randn(5, dim, generator=generator(1)), torch.randn(3, dim, generator=generator(2))]
    )


def structured_model(gate: float = 0.5, rope: float = 0.7) -> StructMAR:
    """On trained weights, with every new part switched on."""
    model = reference.tiny_model(**reference.STRUCTURED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".gate"):
                parameter.fill_(gate)
            elif part_of(name) in ("text", "layout") and parameter.abs().sum() == 0:
                parameter.normal_(std=0.3, generator=generator(len(name)))
    model.set_rope_strength(rope)
    return model


def predict(model: StructMAR, text: TextContext | None, layout: LayoutBatch | None) -> Tensor:
    tokens = reference.tensors()["train.tokens"]
    kept = mask_from_orders(sample_orders(2, 64, [generator()]), 40).kept_ids()
    context = model.prepare(model.embed_conditions(2, text=text, layout=layout))
    return model.predict(tokens, kept, context).detach()
