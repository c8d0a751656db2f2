"""The frozen parts as the rest of the code knows them; detectors: `detections.py`.

Whatever implements one of these takes its place: another image tokenizer, another text encoder. Each is known by an id,
a sha256, that is stored with the weights trained on it.

Shape letters: B batch, C channels of the latents or of the text, H x W pixels, h x w latent cells, t tokens of a
caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from util.types import TextContext


class ImageCodec(Protocol):
    """Pixels to latents and back. stride: pixels per latent cell. latent_scale: factor on the latents.

    codebook_size: 0 where latents are continuous. Otherwise they are codes, whole numbers below it in float32, one in
    a cell: latent_channels and latent_scale are 1.
    """

    id: str
    latent_scale: float

    @property
    def stride(self) -> int: ...

    @property
    def latent_channels(self) -> int: ...

    @property
    def codebook_size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> what a cache holds of an image, [B, ., h, w]; nothing in it is random."""

    def mode(self, encoded: Tensor) -> Tensor:
        """The likeliest scaled latents of what `encode` gave: [B, C, h, w]."""

    def sample(
        self, encoded: Tensor, generators: Sequence[torch.Generator] | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Scaled latents as training draws them, [B, C, h, w]: by one generator per image, or by given noise."""

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] -> pixels [B, 3, H, W] in [-1, 1]."""


class TextEncoder(Protocol):
    """Captions to token states. max_tokens: longer captions are cut, with a warning. dim: C. stated_cut: max_tokens as
    a cache names it, 0 where it is CLIP's own number."""

    id: str
    max_tokens: int

    @property
    def dim(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def stated_cut(self) -> int: ...

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """The states of each caption's tokens: one [t, C] float32 each."""

    def context(self, captions: Sequence[str]) -> TextContext:
        """States, mask and pooled state of a batch of captions."""

    def phrase_tokens(self, caption: str, phrase: str, number: int = 0) -> range | None:
        """Which of the caption's tokens spell a phrase where it is named for the `number`-th time, from 0; None where
        it is not."""
