"""What the caption's words are looked at by: maps of the decoder's cross-attention, observed while an image is drawn.

Of one pass, over the decoder's blocks i before the last that attend to the caption (the last one computes only the
tokens that are asked for), with H heads and gates g:

    maps = sum_i |tanh g_i| mean_h softmax(q k^T / sqrt(d)) / sum_i |tanh g_i|

Shape letters: B images, R rows with text (B or more), L image tokens, K buffer slots, T text tokens, H heads, d head
width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class AttentionWatch:
    """Sums the maps of a pass. num_images: B, of the full branch, whose rows come first. num_slots: K."""

    def __init__(self, num_images: int, num_slots: int) -> None:
        self.num_images, self.num_slots = num_images, num_slots
        self._sum: Tensor | None = None
        self._weight: Tensor | None = None

    def see(self, queries: Tensor, keys: Tensor, valid: Tensor, gate: Tensor) -> None:
        """What one block attends by. queries: [R, H, K + L, d]; keys: [R, H, T, d]; valid: [R, T] bool; gate: [1]."""
        count, scale = self.num_images, queries.shape[-1] ** -0.5
        queries, keys = queries[:count, :, self.num_slots :].float(), keys[:count].float()  # [B, H, L, d], [B, H, T, d]
        logits = (queries * scale) @ keys.transpose(-1, -2)  # [B, H, L, T]
        logits = logits.masked_fill(~valid[:count, None, None, :], -math.inf)  # [B, H, L, T]
        weight = torch.tanh(gate.float()).abs()  # [1]
        seen = weight * logits.softmax(-1).mean(1)  # [B, L, T]
        self._sum = seen if self._sum is None else self._sum + seen  # [B, L, T]
        self._weight = weight if self._weight is None else self._weight + weight  # [1]

    def maps(self) -> Tensor:
        """How much each image token looks at each of the caption's, the null token first: [B, L, T] float32, which
        sums to 1 over T."""
        assert self._sum is not None and self._weight is not None, "nothing was seen"
        return self._sum / self._weight  # [B, L, T]
