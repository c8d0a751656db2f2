"""Phrases of boxes: what a box holds in words ("large red umbrella"), beside its class or instead of it.

In training a box has with probability p its phrase, and half of these boxes have no class beside it (`UNKNOWN`). A box
that the dataset gives no phrase goes by its class's name. Phrases become what the model adds to a box's token: the text
encoder's states of the phrase, pooled.

Shape letters: B batch, N boxes (max), C text channels, P different phrases.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from models.frozen.base import TextEncoder
from util.coco import CocoImage
from util.types import UNKNOWN, Category, Layout, LayoutBatch

_SIDED = re.compile(r"\b(left|right)(s|most|hand|handed|wards?|side)?\b|[左右]", re.IGNORECASE)
CLASSLESS_SHARE = 0.5  # of the boxes that are given by their phrase
MAX_KEPT = 16384  # encoded phrases


def names_a_side(caption: str) -> bool:
    """Whether a mirrored image would contradict the caption: "left", "Right-hand", "leftmost", "左边", not
    "upright"."""
    return _SIDED.search(caption) is not None


def own_phrases(image: CocoImage, categories: Sequence[Category]) -> tuple[str, ...]:
    """One phrase for each of the image's boxes: its own, else its class's name."""
    named = image.phrases or ("",) * len(image.categories)
    return tuple(phrase or categories[place].name for phrase, place in zip(named, image.categories, strict=True))


def needed_phrases(image: CocoImage) -> tuple[str, ...]:
    """The phrases of the image's boxes that have no category, "" for the others; () where all have one."""
    is_unknown = image.categories == UNKNOWN
    if not is_unknown.any():
        return ()
    return tuple(phrase if needed else "" for phrase, needed in zip(image.phrases, is_unknown, strict=True))


def draw_phrases(layout: Layout, prob: float, generator: torch.Generator) -> Layout:
    """What a training step sees of a layout whose boxes all have phrases: a box keeps its phrase with probability
    `prob`, and of these every second one on average loses its class. One without a class always keeps its phrase."""
    draws = torch.rand(2, len(layout), generator=generator)
    is_told = (draws[0] < prob) | (layout.categories == UNKNOWN)
    is_classless = is_told & (draws[1] < CLASSLESS_SHARE)
    phrases = tuple(phrase if told else "" for phrase, told in zip(layout.phrases, is_told.tolist(), strict=True))
    categories = layout.categories.masked_fill(is_classless, UNKNOWN)
    return replace(layout, categories=categories, phrases=phrases if any(phrases) else ())


class PhraseEncoder:
    """Phrases to pooled states. Each phrase is encoded once, alone, so that its state depends on nothing else."""

    def __init__(self, text_encoder: TextEncoder) -> None:
        self.text_encoder = text_encoder
        self._states: dict[str, Tensor] = {}

    def fill(self, layout: LayoutBatch, phrases: Sequence[Sequence[str]]) -> LayoutBatch:
        """The layout with the states of its boxes' phrases, zeros where a box has none. phrases: per image one for each
        box, or none at all."""
        named = sorted({phrase for own in phrases for phrase in own if phrase})
        row_of = {phrase: row for row, phrase in enumerate(named, start=1)}
        rows = torch.zeros(layout.valid.shape, dtype=torch.int64)  # [B, N], 0 for none
        for image, own in enumerate(phrases):
            for slot, phrase in enumerate(own):
                rows[image, slot] = row_of.get(phrase, 0)
        device = layout.boxes_xyxy.device
        none = torch.zeros(self.text_encoder.dim, device=device)  # [C]
        table = torch.stack([none, *(self._state(phrase).to(device) for phrase in named)])  # [P + 1, C]
        return replace(layout, phrases=table[rows.to(device)])  # [B, N, C]

    def _state(self, phrase: str) -> Tensor:
        if phrase not in self._states:
            if len(self._states) >= MAX_KEPT:
                self._states.clear()
            with torch.no_grad():
                self._states[phrase] = self.text_encoder.context([phrase]).pooled[0].float()  # [C]
        return self._states[phrase]
