"""Which words of a caption name which box, for auto layout guidance (`models/sampling/auto_layout.py`).

A box is looked for by its phrase, and where the caption does not hold that, by its label. The second box of a kind is
the second that the caption names; a plural ("two kites") names all of them.

Shape letters: B scenes, T text tokens, N boxes (max).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.data.scenes import Scene
from models.frozen.base import TextEncoder


def named_tokens(encoder: TextEncoder, scene: Scene) -> list[range | None]:
    """For each box the positions, among the states of the scene's caption, of the tokens that name it; None where it is
    not named, or in the part of the caption that is cut off."""
    asked: Counter[str] = Counter()
    found: list[range | None] = []
    for label, phrase in zip(scene.names, scene.layout.phrases or [""] * len(scene.names), strict=True):
        tokens = None
        for words in (each for each in (phrase, label) if each and tokens is None):
            tokens = encoder.phrase_tokens(scene.prompt, words, asked[words.lower()])
            asked[words.lower()] += 1
        found.append(tokens)
    return found


def phrase_weights(encoder: TextEncoder, scenes: Sequence[Scene], num_tokens: int, max_objects: int) -> Tensor:
    """[B, T, N] float32: the tokens of each box's name share 1, all others have 0. num_tokens: T."""
    weights = torch.zeros(len(scenes), num_tokens, max_objects)  # [B, T, N]
    for row, scene in enumerate(scenes):
        for column, tokens in enumerate(named_tokens(encoder, scene)):
            if tokens is not None:
                weights[row, list(tokens), column] = 1 / len(tokens)
    return weights


def told_names(encoder: TextEncoder, scenes: Sequence[Scene]) -> str:
    """How many boxes the captions name."""
    found = [tokens for scene in scenes for tokens in named_tokens(encoder, scene)]
    return f"the captions name {sum(tokens is not None for tokens in found)} of {len(found)} boxes"
