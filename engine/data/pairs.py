"""From a batch of data to what MARS is trained on: codes of images and captions as ids, in one of two languages.

The language of a caption is keyed by (seed, epoch, image, caption), whatever batch or process the image is in.

Shape letters: B batch, L codes of an image, h x w codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.data.coco import Batch
from engine.data.inputs import encode_latents
from engine.data.translations import Translations
from models.frozen.codes import CodeCodec
from models.mars.losses import Pairs
from models.mars.model import TextBatch
from models.mars.words import CaptionWords
from util.buckets import Size
from util.images import shrink
from util.rng import generator

TRANSLATED_SHARE = 0.5


@dataclass(frozen=True)
class PairInputs:
    """(batch, epoch, generator of this pass) -> pairs. translations: None where captions are in one language.
    drop_prob: of a caption that is to be drawn. low_size: (height, width) in pixels of the small pictures that are made
    larger, which come from the pixels of a batch; None: none are."""

    codec: CodeCodec
    words: CaptionWords
    translations: Translations | None
    drop_prob: float
    seed: int
    device: torch.device
    low_size: Size | None = None

    def __call__(self, batch: Batch, epoch: int, rng: torch.Generator) -> Pairs:
        codes = encode_latents(
            self.codec, batch.pixels, batch.moments, batch.image_ids, self.seed, epoch, self.device
        )  # [B, 1, h, w]
        is_given = torch.rand(len(batch), generator=rng) >= self.drop_prob  # [B]
        low = None
        if self.low_size is not None:
            assert batch.pixels is not None, "small pictures come from large ones"
            low = low_codes(self.codec, batch.pixels.to(self.device), self.low_size).flatten(1)  # [B, l]
        return pairs_of(codes.long().flatten(1), self._captions(batch, epoch), self.words, is_given, low)

    def _captions(self, batch: Batch, epoch: int) -> list[str]:
        """Each in the language that is drawn for it."""
        if self.translations is None:
            return batch.captions
        chosen = []
        for image_id, caption in zip(batch.image_ids, batch.captions, strict=True):
            drawn = torch.rand((), generator=generator(self.seed, "language", epoch, image_id, caption)).item()
            other = self.translations.of(image_id, caption)
            chosen.append(other if drawn < TRANSLATED_SHARE else caption)
        return chosen


def pairs_of(
    codes: Tensor,
    captions: Sequence[str],
    words: CaptionWords,
    is_given: Tensor | None = None,
    low: Tensor | None = None,
) -> Pairs:
    """codes: [B, L] int64, on the device of what is made. is_given: [B] bool, whose captions are there to be drawn;
    None: all. All captions are there to be told, those that were cut without EOS. low: of the same pictures small, [B, l]."""
    if is_given is None:
        is_given = torch.ones(len(codes), dtype=torch.bool)  # [B]
    rows, is_whole = words.cut(captions)
    prompts = [[words.first_token, *(row if given else ())] for row, given in zip(rows, is_given.tolist(), strict=True)]
    return Pairs(
        codes,
        TextBatch.of(prompts, "left"),
        torch.tensor(words.opening),
        TextBatch.of(words.answers(captions), "right"),
        is_given & torch.tensor(is_whole),  # an image does not begin where a caption was cut
        low,
    ).to(codes.device)


def low_codes(codec: CodeCodec, pixels: Tensor, size: Size) -> Tensor:
    """Codes of pictures that are shrunk to `size`, in pixels: [B, 3, H, W] in [-1, 1] -> [B, h, w] int64."""
    return codec.encode(shrink(pixels, size))[:, 0].long()  # [B, h, w]
