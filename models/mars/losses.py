"""What MARS learns from pairs of captions and codes: to draw, to describe, and when to begin to draw.

    drawing      [BOS] caption | <img> c_0 ... c_{L-2}         every code from those before it
    describing   [BOS] | <img> c_0 ... c_{L-1} </img> | caption EOS    every word, by the frozen head
    choice       p(<img>) after the caption: 1 at its end, 0 inside of it
    upscaling    [BOS] caption | <img> low codes </img> <img> c_0 ... c_{L-2}    drawing, in the super-resolution stage

    loss = drawing + caption_weight * describing + choice_weight * choice

The first word is predicted at `</img>`, so that the last layer's experts learn from describing, too. Dropped captions,
for guidance, are rows of BOS alone.

Shape letters: B batch, t text positions, L codes of an image, K codes of the codebook, V words, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.mars.model import Mars, TextBatch

NOT_COUNTED = -100  # what cross entropy leaves out


@dataclass(frozen=True)
class Pairs:
    """codes: [B, L] int64. prompt: captions to draw, with BOS before them where the language model has one, padded on
    the left. opening: what stands before an image that is described, the same in all rows: [b], BOS or nothing.
    answer: captions with EOS, padded on the right. has_caption: [B] bool, which prompts have one that was not cut. low:
    [B, l] int64, codes of the same images small, for a model that makes them larger.

    Raises ValueError for parts of other lengths.
    """

    codes: Tensor
    prompt: TextBatch
    opening: Tensor
    answer: TextBatch
    has_caption: Tensor
    low: Tensor | None = None

    def __post_init__(self) -> None:
        sizes = [len(self.codes), len(self.prompt), len(self.answer), len(self.has_caption)]
        if self.codes.dim() != 2 or len(set(sizes)) != 1:
            raise ValueError(
                f"codes {tuple(self.codes.shape)} must be [B, L] with as many prompts, answers and has_caption, got "
                f"{sizes[1]}, {sizes[2]} and {sizes[3]}"
            )

    def to(self, device: torch.device | str) -> Pairs:
        codes, opening, has_caption = (each.to(device) for each in (self.codes, self.opening, self.has_caption))
        low = None if self.low is None else self.low.to(device)
        return Pairs(codes, self.prompt.to(device), opening, self.answer.to(device), has_caption, low)


@dataclass(frozen=True)
class Losses:
    """Scalars. total: what is descended; the others: its parts, without weights and gradients, None where left out."""

    total: Tensor
    drawing: Tensor
    describing: Tensor | None = None
    choice: Tensor | None = None


class MarsObjective(nn.Module):
    """The model and its losses as one module, the one to wrap for DDP. Weights of 0 leave a part out."""

    def __init__(self, model: Mars) -> None:
        super().__init__()
        self.model = model

    def forward(self, pairs: Pairs, caption_weight: float = 1.0, choice_weight: float = 0.0) -> Losses:
        """The same weights on all processes. Raises ValueError for negative ones, and for describing by a model that
        makes images larger."""
        if caption_weight < 0 or choice_weight < 0:
            raise ValueError(f"weights must not be negative, got {caption_weight} and {choice_weight}")
        if caption_weight and self.model.config.low_grid is not None:
            raise ValueError(f"a model that makes images larger describes none, got caption_weight {caption_weight}")
        drawing, choice = drawing_losses(self.model, pairs, with_choice=choice_weight > 0)
        total = drawing
        describing = describing_loss(self.model, pairs) if caption_weight else None
        if describing is not None:
            total = total + caption_weight * describing
        if choice is not None:
            total = total + choice_weight * choice
        parts = [None if part is None else part.detach() for part in (describing, choice)]
        return Losses(total, drawing.detach(), *parts)


def drawing_losses(model: Mars, pairs: Pairs, with_choice: bool = False) -> tuple[Tensor, Tensor | None]:
    """(cross entropy of all codes, that of beginning an image or None), means over codes and over positions of text.

    Raises ValueError for images of another number of codes than the model's, large or small.
    """
    require_codes(model, pairs.codes)
    image = model.image_segment(model.after_small(pairs.low, model.opened(pairs.codes[:, :-1])))  # [B, l + 2 + L, D]
    text_states, states = model.read([model.text_segment(pairs.prompt), image])  # [B, t, D], [B, l + 2 + L, D]
    states = states[:, model.config.low_length :]  # [B, L, D]
    drawing = F.cross_entropy(model.code_logits(states).flatten(0, 1), pairs.codes.flatten())  # []
    choice = choice_loss(model, text_states, pairs.prompt, pairs.has_caption) if with_choice else None
    return drawing, choice


def describing_loss(model: Mars, pairs: Pairs) -> Tensor:
    """Cross entropy of the words and EOS after an image, a mean over those that are no padding.

    The mean is that of these pairs: over processes and passes of a step such means count alike, however many words each
    has, so that two processes come near one with twice the batch and do not equal it.
    """
    logits, ids = _answers(model, pairs)  # [B, t, V], [B, t]
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten())  # []


@torch.no_grad()
def caption_losses(model: Mars, pairs: Pairs) -> Tensor:
    """The same for each image, a mean over the words of its own caption: [B]."""
    logits, ids = _answers(model, pairs)  # [B, t, V], [B, t]
    losses = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")  # [B, t], 0 where nothing is counted
    return losses.sum(1) / (ids != NOT_COUNTED).sum(1)  # [B]


def _answers(model: Mars, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """(logits [B, t, V] float32, ids [B, t] with `NOT_COUNTED` at padding) of the words and EOS after an image."""
    require_codes(model, pairs.codes)
    answer, inner = pairs.answer, pairs.answer.valid
    opening = TextBatch(pairs.opening.expand(len(pairs.codes), -1))
    told = TextBatch(answer.ids[:, :-1], None if inner is None else inner[:, :-1])  # the last word predicts nothing
    segments = [model.text_segment(opening), model.image_segment(model.closed(pairs.codes)), model.text_segment(told)]
    _, image_states, text_states = model.read(segments)  # [B, b, D], [B, L + 2, D], [B, t - 1, D]
    states = torch.cat([image_states[:, -1:], text_states], dim=1)  # [B, t, D]
    ids = answer.ids if inner is None else answer.ids.masked_fill(~inner, NOT_COUNTED)  # [B, t]
    return model.word_logits(states).float(), ids  # [B, t, V], [B, t]


def choice_loss(model: Mars, states: Tensor, prompt: TextBatch, has_caption: Tensor) -> Tensor:
    """Binary cross entropy of an image that begins next, a mean over the text positions of rows with a caption, padded
    on the left. Only the head's row of `<img>` learns from it. states: [B, t, D]; has_caption: [B] bool.

    As in `describing_loss`, the mean is that of these rows, and counts as much as that of another process or pass.
    """
    is_end = torch.zeros_like(prompt.ids, dtype=torch.bool)  # [B, t]
    is_end[:, -1:] = True
    counted = (prompt.shown() & has_caption[:, None]).float()  # [B, t]
    logits = model.image_logits(states.detach())  # [B, t]
    loss = F.binary_cross_entropy_with_logits(logits, is_end.float(), reduction="none")  # [B, t]
    return (loss * counted).sum() / counted.sum().clamp(min=1)  # []


def require_codes(model: Mars, codes: Tensor) -> None:
    """Raises ValueError for [B, L] of another number of codes than the model's grid has."""
    if codes.shape[1] != model.config.num_tokens:
        raise ValueError(
            f"images have {codes.shape[1]} codes, the model's grid {model.config.grid} has {model.config.num_tokens}"
        )
