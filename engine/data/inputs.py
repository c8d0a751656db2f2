"""From a batch of data to what the model is trained on: latents, encoded captions, conditions dropped at random.

The loop knows only `StepInputs`. Two sources make them: COCO batches (captions and boxes) and class-labelled batches
(MAR's own pretraining). A latent's noise is keyed by (seed, epoch, image), whatever batch or process the image is in.

Shape letters: B batch, C latent channels, h x w latent cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.data.classes import ClassBatch
from engine.data.coco import Batch
from engine.data.phrases import PhraseEncoder
from models.conditioning import drop_conditions, drop_labels
from models.frozen.base import ImageCodec, TextEncoder
from util.rng import generator
from util.types import LayoutBatch, SizeBatch, TextContext


@dataclass(frozen=True)
class StepInputs:
    """latents: [B, C, h, w], scaled. labels: [B] int64. sizes: None for whole pictures. All on the training device."""

    latents: Tensor
    labels: Tensor | None = None
    text: TextContext | None = None
    layout: LayoutBatch | None = None
    sizes: SizeBatch | None = None

    def __len__(self) -> int:
        return self.latents.shape[0]


MakeInputs = Callable[[Any, int, torch.Generator], StepInputs]
"""(batch, epoch, generator of this pass) -> what the model is trained on."""


@dataclass(frozen=True)
class DropRates:
    """both: text and layout together (--label_drop_prob); text, layout: each alone."""

    both: float
    text: float
    layout: float


@dataclass(frozen=True)
class CocoInputs:
    """A `MakeInputs` for COCO batches: pixels or cached moments, captions or cached text states. phrases: None for a
    model that knows boxes by their classes alone."""

    codec: ImageCodec
    text_encoder: TextEncoder
    rates: DropRates
    seed: int
    device: torch.device
    phrases: PhraseEncoder | None = None

    def __call__(self, batch: Batch, epoch: int, rng: torch.Generator) -> StepInputs:
        latents = encode_latents(
            self.codec, batch.pixels, batch.moments, batch.image_ids, self.seed, epoch, self.device
        )
        text = self.text_encoder.context(batch.captions) if batch.text is None else batch.text
        rates = self.rates
        layout = batch.layout if self.phrases is None else self.phrases.fill(batch.layout, batch.phrases)
        kept_text, kept_layout = drop_conditions(text, layout, rates.both, rates.text, rates.layout, rng)
        return StepInputs(
            latents,
            text=kept_text.to(self.device),
            layout=kept_layout.to(self.device),
            sizes=batch.sizes.to(self.device),
        )


@dataclass(frozen=True)
class ClassInputs:
    """A `MakeInputs` for class-labelled batches, --train_mode class."""

    codec: ImageCodec
    drop_prob: float
    seed: int
    device: torch.device

    def __call__(self, batch: ClassBatch, epoch: int, rng: torch.Generator) -> StepInputs:
        latents = encode_latents(
            self.codec, batch.pixels, batch.moments, batch.image_ids, self.seed, epoch, self.device
        )
        return StepInputs(latents, labels=drop_labels(batch.labels, self.drop_prob, rng).to(self.device))


def encode_latents(
    codec: ImageCodec,
    pixels: Tensor | None,
    moments: Tensor | None,
    image_ids: Sequence[int],
    seed: int,
    epoch: int,
    device: torch.device,
) -> Tensor:
    """One draw of the VAE's posterior per image, or its codes: latents [B, C, h, w] in float32, without gradients."""
    if moments is None:
        assert pixels is not None, "a batch holds pixels or moments"
        moments = codec.encode(pixels.to(device, non_blocking=True))  # [B, 2C, h, w]
    generators = [generator(seed, "latent", epoch, image_id) for image_id in image_ids]
    return codec.sample(moments.to(device, non_blocking=True), generators)  # [B, C, h, w]
