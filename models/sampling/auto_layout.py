"""Auto layout guidance: from an iteration on, a box reaches where the caption's attention to its words was.

The maps of the decoder's cross-attention (`models/attention_maps.py`), averaged over a box's words and over the
iterations before, say how much each token looks at what the box names. Scaled to [0, 1] and cut at a threshold, they
are the object's mask, which replaces the box in the attention bias (after MS-Diffusion, arXiv:2406.07209):

    mask = (A - min A) / (max A - min A + 1e-5) > threshold

The box's token keeps the box. Where the caption does not name a box, or its mask is empty, the box stays as given.
Without boxes at first (`drop_grounding_tokens`), those that are found enter as their masks' bounding boxes.

Left out: masks of single layers, and of the heads apart.

Shape letters: B images, L image tokens, N boxes (max), T text tokens, b images of one observation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from models.blocks import Block
from models.conditioning import Conditions
from models.sampling.config import SamplingConfig
from models.structmar import StructMAR
from util.types import LayoutBatch, TextContext

MIN_GATE = 1e-3  # below, in all blocks, the caption does not reach the image by attention
EPSILON = 1e-5


class AutoLayout:
    """See the module's docstring; `Controls` of `controls.py`. Made by `build_auto_layout`.

    words: [B, T, N], the share of each of the caption's tokens, the null token first, in what names a box: columns that
    sum to 1, or to 0 where nothing names it. embed: conditions of the same images with another layout. bias_value: what
    the attention bias takes away outside of a box.
    """

    def __init__(
        self,
        config: SamplingConfig,
        words: Tensor,
        layout: LayoutBatch,
        embed: Callable[[LayoutBatch], Conditions],
        bias_value: float,
    ) -> None:
        assert config.mask_threshold is not None and config.start_step is not None, "auto layout guidance is on"
        self.threshold, self.start_step, self.updates = config.mask_threshold, config.start_step, config.auto_update
        self.words, self.layout, self.embed, self.bias_value = words, layout, embed, bias_value
        self.before: Conditions | None = None
        if config.drop_grounding_tokens:
            self.before = embed(layout.dropped(torch.ones_like(layout.valid[:, 0])))
        self.after: Conditions | None = None
        self.mean: Tensor | None = None

    def changes(self, visible: Sequence[float]) -> frozenset[int]:
        return frozenset(range(self.start_step, len(visible) if self.updates else self.start_step + 1))

    def observes(self, iteration: int) -> bool:
        return self.updates or iteration < self.start_step

    def observe(self, iteration: int, maps: Tensor, rows: Sequence[int] | None) -> None:
        """maps: [b, L, T] of these rows of the batch (None: all). Iteration 0 begins anew."""
        chosen = slice(None) if rows is None else list(rows)
        words = self.words[chosen]  # [b, T, N]
        seen = maps[..., : words.shape[1]] @ words  # [b, L, N]
        if self.mean is None:
            self.mean = seen.new_zeros(len(self.words), *seen.shape[1:])  # [B, L, N]
        mean = self.mean[chosen]  # [b, L, N]
        self.mean[chosen] = mean + (seen - mean) / (iteration + 1) if iteration else seen

    def at(self, iteration: int, visible: float, conditions: Conditions) -> Conditions:
        if iteration < self.start_step:
            return conditions if self.before is None else self.before
        if self.after is None or iteration == self.start_step or self.updates:
            self.after = self._guided(conditions)
        return self.after

    def _guided(self, conditions: Conditions) -> Conditions:
        """With masks, or their bounding boxes, for what was found."""
        assert self.mean is not None and conditions.layout_bias is not None, "maps were seen, of images with a layout"
        masks = masks_of_maps(self.mean, self.threshold)  # [B, L, N]
        found = masks.any(1) & (self.words.sum(1) > 0) & self.layout.valid  # [B, N]
        if self.before is not None:
            boxes = boxes_of_masks(masks, conditions.grid)  # [B, N, 4]
            boxes = torch.where(found[..., None], boxes, self.layout.boxes_xyxy)  # [B, N, 4]
            return self.embed(replace(self.layout, boxes_xyxy=boxes, valid=found))
        bias = torch.zeros_like(conditions.layout_bias).masked_fill(~masks, -self.bias_value)  # [B, L, N]
        bias = torch.where(found[:, None], bias, conditions.layout_bias)  # [B, L, N]
        return replace(conditions, layout_bias=bias)


def masks_of_maps(maps: Tensor, threshold: float) -> Tensor:
    """Where each map, scaled to [0, 1], exceeds the threshold. [B, L, N] -> bool [B, L, N]; a constant map does
    nowhere."""
    low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)  # [B, 1, N] each
    return (maps - low) / (high - low + EPSILON) > threshold  # [B, L, N]


def boxes_of_masks(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """The bounding box of each mask. bool [B, L, N] of an (h, w) grid -> xyxy in [0, 1], [B, N, 4]; of an empty mask
    the whole image."""
    cells = masks.transpose(1, 2).unflatten(2, grid)  # [B, N, h, w]
    ends = []
    for dim, length in ((2, grid[1]), (3, grid[0])):
        occupied = cells.any(dim).float()  # [B, N, w], then [B, N, h]
        first, after_last = occupied.argmax(-1), length - occupied.flip(-1).argmax(-1)  # [B, N] each
        ends.append((first / length, after_last / length))
    (x0, x1), (y0, y1) = ends  # [B, N] each
    return torch.stack([x0, y0, x1, y1], -1)  # [B, N, 4]


def build_auto_layout(
    model: StructMAR,
    config: SamplingConfig,
    text: TextContext | None,
    layout: LayoutBatch | None,
    phrase_weights: Tensor | None,
    grid: tuple[int, int],
    labels: Tensor | None = None,
) -> AutoLayout:
    """Of images with captions and boxes. phrase_weights: [B, T - 1, N], of the caption's own tokens.

    Raises ValueError without captions, boxes or these, and for a model whose attention maps say nothing or are not to
    be seen.
    """
    given = {"captions": text, "boxes": layout, "phrase_weights": phrase_weights}
    missing = [name for name, part in given.items() if part is None]
    if missing:
        raise ValueError(f"mask_threshold {config.mask_threshold} needs {', '.join(missing)}, which are not given")
    assert text is not None and layout is not None and phrase_weights is not None
    if phrase_weights.shape != (*text.valid.shape, layout.valid.shape[1]):
        wanted = [*text.valid.shape, layout.valid.shape[1]]
        raise ValueError(f"phrase_weights must be {wanted}, got {list(phrase_weights.shape)}")
    require_maps(model, f"mask_threshold {config.mask_threshold}")
    null = phrase_weights.new_zeros(len(text), 1, phrase_weights.shape[2])  # [B, 1, N]
    words = torch.cat([null, phrase_weights], 1)  # [B, T, N]

    def embed(other: LayoutBatch) -> Conditions:
        return model.embed_conditions(len(other), labels, text, other, grid)

    return AutoLayout(config, words, layout, embed, model.config.layout_bias_value)


def require_maps(model: StructMAR, what: str) -> None:
    """Raises ValueError, beginning with `what`, if no block that is observed attends to the caption."""
    if model.compile_mode is not None:
        raise ValueError(f"{what} looks into the decoder's blocks, which does not go with compiled ones")
    blocks = [cast(Block, block) for block in model.decoder_blocks][:-1]
    gates: list[Tensor] = [block.cross.gate for block in blocks if block.cross is not None]
    if not gates:
        raise ValueError(f"{what} needs cross-attention to the caption in a block of the decoder before its last")
    strongest = float(torch.cat(gates).detach().tanh().abs().max())
    if strongest < MIN_GATE:
        raise ValueError(
            f"{what}: the caption does not reach these blocks, the strongest gate of their cross-attention is "
            f"{strongest:.1e}, at least {MIN_GATE:g} is needed"
        )
