"""What an image is conditioned on, embedded once per image, and the one place where conditions are dropped.

Shape letters: B batch, L image tokens, N boxes (max), D width, T text tokens, C text channels.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    text_valid: [B, T] bool, at least one per row. num_with_text: rows that were given captions; they come first, the
    others have the null token alone. grid: (rows, columns) of the image tokens, L in all. layout_scales: [B, N], how
    strongly each layout token is heard, 1 as trained; None: 1 throughout.
    """

    base: Tensor
    layout_tokens: Tensor | None
    layout_bias: Tensor | None
    text: Tensor | None
    text_valid: Tensor | None
    num_with_text: int
    grid: tuple[int, int]
    layout_scales: Tensor | None = None

    def has_text_of(self, other: Conditions) -> bool:
        """Whether both hold the very same states of captions."""
        same = self.text is other.text and self.text_valid is other.text_valid
        return same and self.num_with_text == other.num_with_text

    def first(self, num_images: int) -> Conditions:
        """Those of the first images alone."""
        return self.rows(range(num_images))

    def rows(self, rows: Sequence[int]) -> Conditions:
        """Those of some images, in ascending order."""
        chosen = slice(rows.start, rows.stop) if isinstance(rows, range) else list(rows)  # a slice copies nothing
        optional = (self.layout_tokens, self.layout_bias, self.text, self.text_valid, self.layout_scales)
        tokens, bias, text, text_valid, scales = (None if part is None else part[chosen] for part in optional)
        num_with_text = sum(row < self.num_with_text for row in rows)
        return Conditions(self.base[chosen], tokens, bias, text, text_valid, num_with_text, self.grid, scales)


def stack_conditions(parts: Sequence[Conditions]) -> Conditions:
    """Concatenates along the batch; shorter texts are padded, missing biases are zero, missing scales one."""
    first = parts[0]
    bias = _filled([part.layout_bias for part in parts], 0.0)  # [B, L, N]
    scales = _filled([part.layout_scales for part in parts], 1.0)  # [B, N]
    text = text_valid = None
    if first.text is not None and first.text_valid is not None:
        length = max(part.text.shape[1] for part in parts if part.text is not None)
        text = torch.cat([_pad_rows(part.text, length) for part in parts if part.text is not None])
        text_valid = torch.cat([_pad_rows(part.text_valid, length) for part in parts if part.text_valid is not None])
    tokens = None
    if first.layout_tokens is not None:
        tokens = torch.cat([part.layout_tokens for part in parts if part.layout_tokens is not None])
    base = torch.cat([part.base for part in parts])
    num_with_text = sum(part.num_with_text for part in parts)
    ends = [part.num_with_text == len(part.base) for part in parts]  # whether a part is all captions
    if any(later.num_with_text and not all_before for later, all_before in zip(parts[1:], ends, strict=False)):
        num_with_text = len(base)  # captions do not come first: every row reads its own tokens, the null token too
    return Conditions(base, tokens, bias, text, text_valid, num_with_text, first.grid, scales)


def _filled(parts: Sequence[Tensor | None], value: float) -> Tensor | None:
    """Tensors of one shape along the batch, `value` for missing ones; None where all are missing."""
    known = next((part for part in parts if part is not None), None)
    if known is None:
        return None
    return torch.cat([torch.full_like(known, value) if part is None else part for part in parts])


def _pad_rows(x: Tensor, length: int) -> Tensor:
    """Pads dimension 1 with zeros (False)."""
    return torch.cat([x, x.new_zeros(x.shape[0], length - x.shape[1], *x.shape[2:])], dim=1)


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
    that the two can be guided apart. They are chosen by `generator`, on its device.
    """
    both = _coin(len(text), both_prob, generator)
    drop_text = both | _coin(len(text), text_prob, generator)
    drop_layout = both | _coin(len(text), layout_prob, generator)
    return text.dropped(drop_text.to(text.valid.device)), layout.dropped(drop_layout.to(layout.valid.device))


def drop_labels(labels: Tensor, prob: float, generator: torch.Generator) -> Tensor:
    """Class labels [B] with random ones replaced by NO_LABEL."""
    drop = _coin(labels.shape[0], prob, generator).to(labels.device)
    return labels.masked_fill(drop, NO_LABEL)
