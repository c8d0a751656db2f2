"""Drawing images code by code, with guidance by the caption.

    logits = u + w (c - u)      c: after the prompt, u: after no caption or a negative prompt
    code   = inverse of the cumulative probabilities at a uniform number

One pass reads the prompts of both branches, padded on the left, another one small images that are made larger, which
both branches see; then one code a step. The numbers of an image come from
its own generator before the first step, one a code, so an image does not depend on the batch it is drawn in. Exactly
h * w codes are drawn, whatever the grid.

Left out: drawing several codes in a step; a cache of fixed size.

Shape letters: B images, G branches, L codes of an image, K codes of the codebook, D width, t text positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.heads.discrete_sampler import CodeOptions, draw_codes
from models.mars.model import Mars, TextBatch
from models.mars.passes import Context
from models.semvie import require_room

MAX_GUIDANCE = 100.0


@dataclass(frozen=True)
class DrawOptions:
    """guidance: w; 1 is without, and 0 draws what the other branch says. temperature: above 0. top_k: of the codes,
    after guidance; None takes all. grid: (h, w); None takes the model's. Raises ValueError for values outside."""

    guidance: float = 5.0
    temperature: float = 1.0
    top_k: int | None = None
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.guidance <= MAX_GUIDANCE:  # NaN is refused too
            raise ValueError(f"guidance must lie in [0, {MAX_GUIDANCE:g}], got {self.guidance}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be above 0, got {self.temperature}; top_k 1 draws the likeliest code")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.grid is not None and (len(self.grid) != 2 or min(self.grid) < 1):
            raise ValueError(f"grid must be two numbers of at least 1, (rows, columns), got {self.grid}")

    @property
    def num_branches(self) -> int:
        """G: 1 without guidance, and where the other branch alone counts."""
        return 1 if self.guidance in (0, 1) else 2

    def code_options(self) -> CodeOptions:
        return CodeOptions(self.temperature, self.top_k)

    def grid_of(self, model: Mars) -> tuple[int, int]:
        """(h, w) of what is drawn."""
        return self.grid or model.config.grid


def draw_tape(generators: Sequence[torch.Generator], num_tokens: int, device: torch.device | str) -> Tensor:
    """All that is random about images: numbers in [0, 1), [B, L] float64 on `device`."""
    rows = [torch.rand(num_tokens, dtype=torch.float64, generator=each, device=each.device) for each in generators]
    return torch.stack(rows).to(device)  # [B, L]


@torch.no_grad()
def draw_images(
    model: Mars,
    prompts: Sequence[Sequence[int]],
    negative: Sequence[int],
    generators: Sequence[torch.Generator],
    options: DrawOptions,
    low: Tensor | None = None,
) -> Tensor:
    """Codes of one image a prompt: [B, h, w] int64.

    prompts: word ids with BOS before them; negative: those of no caption, or of what is not wanted; low: codes of the
    small images that are made larger, [B, l] int64. Raises ValueError for another number of generators or small images
    than of prompts, and for more positions than there is room for, before any work.
    """
    if len(prompts) != len(generators):
        raise ValueError(f"every prompt needs a generator, got {len(prompts)} prompts and {len(generators)} generators")
    if low is not None and len(low) != len(prompts):
        raise ValueError(f"every prompt needs a small image, got {len(prompts)} prompts and {len(low)} images")
    others = [list(negative)] * len(prompts)
    context = Context(model.decoder)
    rows = [*([] if options.guidance == 0 else prompts), *([] if options.guidance == 1 else others)]
    text, grid = TextBatch.of(rows, "left", model.device), options.grid_of(model)
    small = None if low is None else low.repeat(options.num_branches, 1)  # [G * B, l]
    before = model.after_small(small, text.ids[:, :0])  # [G * B, l + 2], or nothing
    require_room(model.decoder, text.ids.shape[1] + model.config.low_length + math.prod(grid))
    context.read(model.text_segment(text))
    if low is not None:
        context.read(model.image_segment(before))
    tape = draw_tape(generators, math.prod(grid), model.device)  # [B, L]
    return draw_codes_after(model, [context], tape, options).unflatten(1, grid)  # [B, h, w]


@torch.no_grad()
def draw_codes_after(model: Mars, contexts: Sequence[Context], tape: Tensor, options: DrawOptions) -> Tensor:
    """The codes of images that begin now: [B, L] int64.

    contexts: one that holds all branches' rows, the guided branch's B first, or one for each branch. tape: [B, L].
    Afterwards they have read `<img>` and all codes but the last.
    """
    batch_size, num_tokens = tape.shape
    num_copies = options.num_branches // len(contexts)
    rows = torch.full((batch_size, 1), model.image_start, device=tape.device)  # [B, 1]
    drawn = []
    for index in range(num_tokens):
        segment = model.image_segment(rows.repeat(num_copies, 1))  # [G * B, 1, D], [B, 1, D] for a branch of its own
        states = torch.cat([context.read(segment) for context in contexts])  # [G * B, 1, D]
        logits = _guided(model.code_logits(states[:, 0]), batch_size, options.guidance)  # [B, K]
        rows, _ = draw_codes(logits[:, None], tape[:, index, None], options.code_options())  # [B, 1]
        drawn.append(rows)
    return torch.cat(drawn, dim=1)  # [B, L]


def _guided(logits: Tensor, batch_size: int, guidance: float) -> Tensor:
    """[G * B, K] -> [B, K]."""
    if len(logits) == batch_size:
        return logits  # [B, K]
    wanted, other = logits.chunk(2)  # [B, K] each
    return other + guidance * (wanted - other)  # [B, K]
