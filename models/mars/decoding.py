"""Words from MARS: captions of images, and sequences of words and images.

    describing   [BOS] | <img> codes </img> | w_1 w_2 ... EOS, each word the likeliest by the frozen head
    joint        words -> <img> -> exactly h * w codes -> </img> -> words ...

Whether an image begins is asked after every word, before the next one is chosen: where p(<img>) exceeds a threshold.
The words' own logits stay as they are, so that without images a sequence is the language model's greedy one.

Left out: sampling of words, and beams.

Shape letters: B sequences, t text positions, L codes of an image, D width, V words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from models.mars.losses import require_codes
from models.mars.model import Mars, TextBatch
from models.mars.passes import Context
from models.mars.sampling import DrawOptions, draw_codes_after, draw_tape
from models.semvie import require_room


@dataclass(frozen=True)
class Words:
    """A run of words, by their ids."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class Image:
    """codes: [h, w] int64."""

    codes: Tensor


Part: TypeAlias = Words | Image


@dataclass(frozen=True)
class JointOptions:
    """max_words: of all that is written; max_images: begun at most; image_threshold: p(<img>) above which one begins;
    end_ids: words that end the sequence; draw: how images are drawn. Raises ValueError for values outside."""

    max_words: int
    max_images: int
    end_ids: tuple[int, ...]
    image_threshold: float = 0.5
    draw: DrawOptions = field(default_factory=DrawOptions)

    def __post_init__(self) -> None:
        if self.max_words < 1 or self.max_images < 0:
            raise ValueError(
                f"max_words must be at least 1 and max_images at least 0, got {self.max_words} and {self.max_images}"
            )
        if not 0 <= self.image_threshold <= 1:
            raise ValueError(f"image_threshold must lie in [0, 1], got {self.image_threshold}")


@torch.no_grad()
def describe_images(
    model: Mars,
    codes: Tensor,
    opening: Sequence[int],
    end_ids: Sequence[int],
    max_words: int,
    beginning: Sequence[int] = (),
) -> list[list[int]]:
    """The word ids of a caption of each image, its beginning included, without what ended it.

    codes: [B, L] int64; opening: what stands before an image, BOS or nothing; beginning: words that every caption
    starts with, such as choose its language. max_words: of what is written after them. Raises ValueError for images of
    another number of codes than the model's, for a model that makes images larger, for no words at most, and for more
    positions than there is room for.
    """
    model.require_small(None)
    require_codes(model, codes)
    if max_words < 1:
        raise ValueError(f"max_words must be at least 1, got {max_words}")
    length = len(opening) + codes.shape[1] + 2 + len(beginning) + max_words - 1  # all words but the last are read
    require_room(model.decoder, length)
    context = Context(model.decoder)
    context.read(model.text_segment(TextBatch.of([opening] * len(codes), "left", model.device)))
    states = context.read(model.image_segment(model.closed(codes)))[:, -1]  # [B, D]
    if beginning:
        started = TextBatch.of([beginning] * len(codes), "left", model.device)
        states = context.read(model.text_segment(started))[:, -1]  # [B, D]
    written: list[Tensor] = []
    ends = torch.tensor(list(end_ids), device=model.device)  # [e]
    is_done = torch.zeros(len(codes), dtype=torch.bool, device=model.device)  # [B]
    for _ in range(max_words):
        words = model.word_logits(states).argmax(-1)  # [B]
        written.append(words)
        is_done |= torch.isin(words, ends)
        if bool(is_done.all()) or len(written) == max_words:
            break
        states = context.read(model.text_segment(TextBatch(words[:, None])))[:, -1]  # [B, D]
    rows = torch.stack(written, dim=1).tolist()  # [B, n]
    return [[*beginning, *_until(row, set(end_ids))] for row in rows]


def _until(row: Sequence[int], end_ids: set[int]) -> list[int]:
    """What stands before the first of `end_ids`."""
    length = next((index for index, word in enumerate(row) if word in end_ids), len(row))
    return list(row[:length])


@torch.no_grad()
def continue_sequence(
    model: Mars,
    prompt: Sequence[Part],
    negative: Sequence[int],
    generator: torch.Generator,
    options: JointOptions,
) -> list[Part]:
    """What MARS writes and draws after words and images: words (with the one that ended it) and images, alternating.

    prompt: as read, with BOS where the language model has one, at least one word or image; its images have the model's
    number of codes. negative: words that guidance of images leads away from. Raises ValueError for an empty prompt,
    and for a model that makes images larger.
    """
    model.require_small(None)
    context = Context(model.decoder)
    prompt = [part for part in prompt if isinstance(part, Image) or part.ids]
    if not prompt:
        raise ValueError("the prompt has no word and no image: there is nothing to go on from")
    state = torch.cat([_read_part(model, context, part) for part in prompt])[-1:]  # [1, D]
    is_after_word = isinstance(prompt[-1], Words)
    parts: list[Part] = []
    words: list[int] = []
    num_words, num_images = 0, 0
    while num_words < options.max_words:
        may_draw = is_after_word and num_images < options.max_images
        if may_draw and model.image_logits(state).sigmoid().item() > options.image_threshold:
            parts += [Words(tuple(words))] if words else []
            image, state = _draw_next(model, context, negative, generator, options.draw)
            parts.append(image)
            words, is_after_word, num_images = [], False, num_images + 1
            continue
        word = model.word_logits(state).argmax(-1)  # [1]
        words.append(int(word))
        num_words, is_after_word = num_words + 1, True
        if words[-1] in options.end_ids or num_words == options.max_words:
            break
        state = context.read(model.text_segment(TextBatch(word[:, None])))[:, -1]  # [1, D]
    return [*parts, Words(tuple(words))]


def _read_part(model: Mars, context: Context, part: Part) -> Tensor:
    """The state at the part's end, [1, D]."""
    if isinstance(part, Words):
        return context.read(model.text_segment(TextBatch.of([part.ids], "left", model.device)))[:, -1]  # [1, D]
    codes = part.codes.flatten()[None].to(model.device)  # [1, L]
    require_codes(model, codes)
    return context.read(model.image_segment(model.closed(codes)))[:, -1]  # [1, D]


def _draw_next(
    model: Mars, context: Context, negative: Sequence[int], generator: torch.Generator, options: DrawOptions
) -> tuple[Image, Tensor]:
    """An image after what the context has read, and the state at its `</img>`, [1, D]."""
    grid = options.grid_of(model)
    other = Context(model.decoder)
    if options.guidance != 1:
        other.read(model.text_segment(TextBatch.of([negative], "left", model.device)))
    contexts = [each for each, left_out in ((context, 0), (other, 1)) if options.guidance != left_out]
    tape = draw_tape([generator], math.prod(grid), model.device)  # [1, L]
    codes = draw_codes_after(model, contexts, tape, options)  # [1, L]
    rest = model.closed(codes)  # [1, L + 2]
    if context in contexts:
        rest = rest[:, -2:]  # [1, 2]: the context has read what is before the last code
    state = context.read(model.image_segment(rest))[:, -1]  # [1, D]
    return Image(codes[0].unflatten(0, grid)), state
