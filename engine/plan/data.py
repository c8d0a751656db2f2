"""What a planner learns from: captions with the layouts of their images, no pixels; and what it is kept from.

Two sets are left out of training. *Held-out* images are those that scores are reported on: another split, or every n-th
image of the only one there is. The *stopping* set is a share of what is left; it decides which weights are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from engine.data.coco import Batch
from models.frozen.base import TextEncoder
from models.planner import PlannerConfig, layout_tokens
from util.coco import CocoIndex
from util.rng import generator
from util.types import TextContext


def without_held_out(index: CocoIndex, every: int) -> CocoIndex:
    """The images that are not every `every`-th by id; all of them for 0."""
    if every == 0:
        return index
    return _with_images(index, [position % every != every - 1 for position in range(len(index))])


def held_out(index: CocoIndex, every: int) -> CocoIndex:
    """The others; all images for 0."""
    if every == 0:
        return index
    return _with_images(index, [position % every == every - 1 for position in range(len(index))])


def stopping_set(index: CocoIndex, share: float, seed: int) -> tuple[CocoIndex, CocoIndex]:
    """(what trains, what decides when to stop): about `share` of the images, drawn by their ids."""
    draws = [float(torch.rand((), generator=generator(seed, "stopping", image.id))) for image in index.images]
    decides = [draw < share for draw in draws]
    return _with_images(index, [not each for each in decides]), _with_images(index, decides)


def _with_images(index: CocoIndex, is_kept: list[bool]) -> CocoIndex:
    images = tuple(image for image, keeps in zip(index.images, is_kept, strict=True) if keeps)
    if not images:
        raise ValueError(f"none of the {len(index)} images of {index.split} is left: hold out fewer, or another share")
    return replace(index, images=images)


@dataclass(frozen=True)
class PlannerInputs:
    """A batch as the model takes it. tokens: [B, S] (see `models.planner`)."""

    tokens: torch.Tensor
    text: TextContext

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class MakePlannerInputs:
    """Batches of captions and boxes -> what the model takes, on its device."""

    encoder: TextEncoder
    config: PlannerConfig
    device: torch.device

    def __call__(self, batch: Batch) -> PlannerInputs:
        text = self.encoder.context(batch.captions) if batch.text is None else batch.text
        return PlannerInputs(layout_tokens(batch.layout, self.config).to(self.device), text.to(self.device))
