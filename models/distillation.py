"""Guidance distillation: a student learns to say on its own what its teacher says under guidance.

    L = mean over scored tokens of d(student(text, layout), g),
    g = t_null + w_text (t_text - t_null) + w_layout (t_text+layout - t_text)

with d of the head (`TokenHead.distance`) and t_b the teacher's frozen predictions of a branch (arXiv:2210.03142, its
first stage, here by text and by layout). Teacher and student see the same states: tokens of given images of which some
are hidden, and the same noise. One branch is then sampled instead of three.

The minimiser says at every such state what the guided teacher says there. States that the guided sampler comes to and
given images do not are left to the student. Left out: the scale as an input; images that the teacher draws itself.

Shape letters: B images, C latent channels, h x w latent cells, r rows of the head, G guidance branches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.sampling.config import SamplingConfig, guidance_scales
from models.sampling.guidance import choose_branches, combine_branches
from models.structmar import StructMAR, TrainingNoise
from util.types import LayoutBatch, SizeBatch, TextContext


@dataclass(frozen=True)
class GuidedTeacher:
    """model: frozen, in eval mode. config: the sampler's; of it count the scales and what they go by."""

    model: StructMAR
    config: SamplingConfig

    @torch.no_grad()
    def predictions(
        self,
        latents: Tensor,
        noise: TrainingNoise,
        text: TextContext | None,
        layout: LayoutBatch | None,
        sizes: SizeBatch | None = None,
    ) -> Tensor:
        """What the sampler's head would go by in the states that `noise` makes of latents [B, C, h, w]: [r, ...] as
        `StructMAR.predictions`. Without any scale but 1, these are the model's own to the bit."""
        names, config = choose_branches(self.config, text is not None, layout is not None)
        given = {"full": (None, text, layout), "text": (None, text, None), "null": (None, None, None)}
        parts = [self.model.predictions(latents, noise, *given[name], sizes) for name in names]
        if len(names) == 1:
            return parts[0]  # [r, ...]
        stacked = torch.stack(parts).float()  # [G, r, ...]
        text_scales, layout_scales = row_scales(self.model, config, noise, stacked)  # each [r, 1, ...]

        def guide(branches: Tensor) -> Tensor:
            by_name = dict(zip(names, branches.unbind(0), strict=True))
            return combine_branches(by_name, text_scales, layout_scales)

        return self.model.head.guided(stacked, guide)  # [r, ...]


def row_scales(model: StructMAR, config: SamplingConfig, noise: TrainingNoise, like: Tensor) -> tuple[Tensor, Tensor]:
    """The scales of text and layout of each row of the head, by how many tokens of its image are hidden.

    like: [G, r, ...], whose device, dtype and shape the scales take: each [r, 1, ...].
    """
    mask = noise.mask
    num_images, num_tokens = mask.masked.shape
    counts = mask.counts or (mask.num_masked,) * num_images
    by_image = torch.tensor([scales_at(config, num_tokens, count) for count in counts])  # [B, 2]
    rows = mask.hidden_rows() if model.config.loss_on == "masked" else torch.arange(mask.masked.numel())  # [r / M]
    scales = by_image.to(like)[rows.to(like.device) // num_tokens]  # [r / M, 2]
    scales = scales.repeat(like.shape[1] // len(scales), 1)  # [r, 2]
    text, layout = (part.reshape(-1, *[1] * (like.dim() - 2)) for part in scales.unbind(1))  # each [r, 1, ...]
    return text, layout


def scales_at(config: SamplingConfig, num_tokens: int, num_masked: int) -> tuple[float, float]:
    """The scales of text and layout in the iteration of the sampler that a state with so many hidden tokens belongs to:
    the last one that begins with at least as many."""
    counts = config.masked_counts(num_tokens)
    iteration = sum(count >= num_masked for count in counts[:-1]) - 1
    if config.branch_uses(num_branches=2)[iteration] == "full only":
        return 1.0, 1.0
    return guidance_scales(config, num_tokens, counts[iteration + 1], iteration)


class Distilled(nn.Module):
    """The student and the loss behind one `forward`, which takes what `StructMAR.forward` takes: wrappers such as DDP
    act on `forward` alone. The teacher is no part of the module."""

    def __init__(self, model: StructMAR, teacher: GuidedTeacher) -> None:
        super().__init__()
        self.model = model
        self.teacher = teacher

    def forward(
        self,
        latents: Tensor,
        noise: TrainingNoise,
        labels: None = None,
        text: TextContext | None = None,
        layout: LayoutBatch | None = None,
        sizes: SizeBatch | None = None,
    ) -> Tensor:
        """L, a scalar. latents: [B, C, h, w] scaled. There are no labels where captions are."""
        wanted = self.teacher.predictions(latents, noise, text, layout, sizes)  # [r, ...]
        found = self.model.predictions(latents, noise, None, text, layout, sizes)  # [r, ...]
        return self.model.head.distance(found, wanted, noise.head).mean()


def require_teachable(config: SamplingConfig) -> None:
    """Raises ValueError for sampling options that a teacher of guidance has no use for."""
    config.require_uncontrolled("guidance distillation, whose teacher hears captions and boxes as they are given")
    if config.prefix_k:
        raise ValueError(f"prefix_k {config.prefix_k} does not go with guidance distillation, which knows no prefix")
