"""What an image is conditioned on, embedded once per image, and the one place where conditions are dropped.

Shape letters: B batch, L image tokens, N boxes (max), D width, T text tokens, C text channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from util.types import LayoutBatch, TextContext

NO_LABEL = -1


@dataclass(frozen=True)
class Conditions:
    """Inputs of every iteration of the backbone, built by `StructMAR.embed_conditions`.

    base: [B, D], the token that fills the buffer. layout_tokens: [B, N, D] or None (a model without layout parts).
    layout_bias: [B, L, N] or None (no layout anywhere). text: [B, T, C] or None (a model without cross-attention), with
    text_valid: [B, T] bool, at least one per row.
    """

    base: Tensor
    layout_tokens: Tensor | None
    layout_bias: Tensor | None
    text: Tensor | None
    text_valid: Tensor | None

    def first(self, num_images: int) -> Conditions:
        parts = (self.base, self.layout_tokens, self.layout_bias, self.text, self.text_valid)
        base, *others = (None if part is None else part[:num_images] for part in parts)
        assert base is not None
        return Conditions(base, *others)


def _coin(batch_size: int, prob: float, generator: torch.Generator) -> Tensor:
    return torch.rand(batch_size, generator=generator, device=generator.device) < prob  # [B] bool


def drop_conditions(
    text: TextContext,
    layout: LayoutBatch,
    both_prob: float,
    text_prob: float,
    layout_prob: float,
    generator: torch.Generator,
) -> tuple[TextContext, LayoutBatch]:
    """Drops conditions of random images, for classifier-free guidance.

    `both_prob` drops text and layout together, `text_prob` and `layout_prob` each alone (independently of the rest), so
    that the two can be guided apart. The draws come from `generator`, on its device.
    """
    both = _coin(len(text), both_prob, generator)
    drop_text = both | _coin(len(text), text_prob, generator)
    drop_layout = both | _coin(len(text), layout_prob, generator)
    return text.dropped(drop_text.to(text.valid.device)), layout.dropped(drop_layout.to(layout.valid.device))


def drop_labels(labels: Tensor, prob: float, generator: torch.Generator) -> Tensor:
    """Class labels [B] with random ones replaced by NO_LABEL."""
    drop = _coin(labels.shape[0], prob, generator).to(labels.device)
    return labels.masked_fill(drop, NO_LABEL)
