"""The structured inputs of the model: boxes and captions, batched and validated once, where they enter.

Shape letters: B batch, N boxes (max), T text tokens, C text channels, n boxes of one image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

NUM_SIZES = 6  # numbers in a row of `SizeBatch`
UNKNOWN = -1  # the category of a box that only a phrase names


@dataclass(frozen=True)
class Category:
    """An object class of a dataset. A category list is sorted by `id`; the contiguous index is the position in it."""

    id: int
    name: str


def require_distinct(categories: Sequence[Category], where: str) -> None:
    """Raises ValueError that begins with `where` if two categories have one id or one name."""
    for field in ("id", "name"):
        seen: dict[object, Category] = {}
        for category in categories:
            value = category.id if field == "id" else category.name
            other = seen.setdefault(value, category)
            if other is not category:
                raise ValueError(
                    f"{where}: two categories have the {field} {value!r}: {other.id} {other.name!r} and "
                    f"{category.id} {category.name!r}"
                )


@dataclass(frozen=True)
class Layout:
    """The boxes of one image.

    boxes_xyxy: [n, 4] float32, normalised to [0, 1], x0 < x1 and y0 < y1. categories: [n] int64, contiguous index, or
    `UNKNOWN` where a phrase says what the box holds. phrases: one per box, "" for none; () where no box has one.
    scales: how strongly each box counts, 1 as trained, None for a box without a strength of its own; () where none has.
    Raises ValueError on any other shape, dtype or range.
    """

    boxes_xyxy: Tensor
    categories: Tensor
    phrases: tuple[str, ...] = ()
    scales: tuple[float | None, ...] = ()

    def __post_init__(self) -> None:
        boxes, categories = self.boxes_xyxy, self.categories
        if boxes.dim() != 2 or boxes.shape[1] != 4 or boxes.dtype != torch.float32:
            raise ValueError(f"boxes_xyxy must be float32 [n, 4], got {boxes.dtype} {tuple(boxes.shape)}")
        if categories.shape != boxes.shape[:1] or categories.dtype != torch.int64:
            raise ValueError(
                f"categories must be int64 [{boxes.shape[0]}], got {categories.dtype} {tuple(categories.shape)}"
            )
        for name, values in (("phrases", self.phrases), ("scales", self.scales)):
            if values and len(values) != len(boxes):
                raise ValueError(f"{name} must be one for each of the {len(boxes)} boxes, got {len(values)}")
        if not all(scale is None or (math.isfinite(scale) and scale >= 0) for scale in self.scales):
            raise ValueError(f"scales must be finite and not negative, got {list(self.scales)}")
        if boxes.numel() == 0:
            return
        if not bool(torch.isfinite(boxes).all()) or boxes.min() < 0 or boxes.max() > 1:
            raise ValueError(f"boxes_xyxy must lie in [0, 1], got {boxes.tolist()}")
        if not bool((boxes[:, 2:] > boxes[:, :2]).all()):
            raise ValueError(f"boxes_xyxy must have x0 < x1 and y0 < y1, got {boxes.tolist()}")
        if categories.min() < UNKNOWN:
            raise ValueError(f"categories must be non-negative indices, got {categories.tolist()}")
        if categories.min() == UNKNOWN:
            for row in (categories == UNKNOWN).nonzero()[:, 0].tolist():
                if not (self.phrases and self.phrases[row]):
                    raise ValueError(f"box {row} has neither a category nor a phrase")

    def __len__(self) -> int:
        return self.boxes_xyxy.shape[0]


@dataclass(frozen=True)
class LayoutBatch:
    """The boxes of a batch, padded to N slots; valid slots come first.

    boxes_xyxy: [B, N, 4] float32 in [0, 1]. categories: [B, N] int64, 0 in padding. valid: [B, N] bool.
    scales: [B, N] float32, NaN where a box has no strength of its own, and in padding; None: no box has one. phrases:
    [B, N, C], the pooled states of the boxes' phrases, zeros where a box has none; None: no box has one.
    An image without any valid slot has no layout at all (dropped, or nothing to place).
    """

    boxes_xyxy: Tensor
    categories: Tensor
    valid: Tensor
    scales: Tensor | None = None
    phrases: Tensor | None = None

    @staticmethod
    def collate(layouts: Sequence[Layout], max_objects: int) -> LayoutBatch:
        """Pads to `max_objects` slots; phrases are still to be encoded. Raises ValueError if an image has more boxes
        than that."""
        boxes = torch.zeros(len(layouts), max_objects, 4)
        categories = torch.zeros(len(layouts), max_objects, dtype=torch.int64)
        valid = torch.zeros(len(layouts), max_objects, dtype=torch.bool)
        scales = torch.full((len(layouts), max_objects), math.nan)
        for row, layout in enumerate(layouts):
            count = len(layout)
            if count > max_objects:
                raise ValueError(f"layout {row} has {count} boxes, more than max_objects={max_objects}")
            boxes[row, :count] = layout.boxes_xyxy
            categories[row, :count] = layout.categories
            valid[row, :count] = True
            if layout.scales:
                scales[row, :count] = torch.tensor([math.nan if each is None else each for each in layout.scales])
        has_scales = any(layout.scales for layout in layouts)
        return LayoutBatch(boxes, categories, valid, scales if has_scales else None)

    def map(self, change: Callable[[Tensor], Tensor]) -> LayoutBatch:
        """The same function of every tensor."""
        return LayoutBatch(*(None if part is None else change(part) for part in self._parts))  # type: ignore[arg-type]

    @property
    def _parts(self) -> tuple[Tensor | None, ...]:
        return self.boxes_xyxy, self.categories, self.valid, self.scales, self.phrases

    def to(self, device: torch.device | str) -> LayoutBatch:
        return self.map(lambda tensor: tensor.to(device))

    def dropped(self, drop: Tensor) -> LayoutBatch:
        """drop: [B] bool. The rows that are True lose their layout."""
        return replace(self, valid=self.valid & ~drop[:, None])

    def with_scale(self, scale: float) -> LayoutBatch:
        """The same where boxes without a strength of their own have this one."""
        if scale == 1:
            return self
        own = torch.full_like(self.boxes_xyxy[..., 0], math.nan) if self.scales is None else self.scales  # [B, N]
        return replace(self, scales=own.nan_to_num(scale))

    def own_scales(self) -> Tensor | None:
        """How strongly each slot counts, 1 in padding and where nothing is said: [B, N], None for 1 throughout."""
        return None if self.scales is None else self.scales.nan_to_num(1.0).masked_fill(~self.valid, 1.0)

    def repeated(self, times: int) -> LayoutBatch:
        """Every row `times` times in a row: [B * times, ...]."""
        return self.map(lambda tensor: tensor.repeat_interleave(times, 0))

    def __len__(self) -> int:
        return self.valid.shape[0]


@dataclass(frozen=True)
class SizeBatch:
    """Sizes of a batch's pictures and of the images they were cut out of.

    values: [B, 6] float32, in pixels: the picture's height and width; the image's height and width; the picture's top
    and left edge in the image as it was resized.
    """

    values: Tensor

    @staticmethod
    def of(rows: Sequence[Sequence[int]]) -> SizeBatch:
        """rows: six numbers for each image."""
        return SizeBatch(torch.tensor(rows, dtype=torch.float32).view(len(rows), NUM_SIZES))

    @staticmethod
    def whole(batch_size: int, height: int, width: int, device: torch.device | str) -> SizeBatch:
        """Images of which nothing was cut off and which were not resized."""
        row = torch.tensor([height, width, height, width, 0, 0], dtype=torch.float32, device=device)
        return SizeBatch(row.expand(batch_size, -1))

    def to(self, device: torch.device | str) -> SizeBatch:
        return SizeBatch(self.values.to(device))

    def __len__(self) -> int:
        return self.values.shape[0]


@dataclass(frozen=True)
class TextContext:
    """Encoded captions.

    tokens: [B, T, C] float. valid: [B, T] bool. pooled: [B, C], the mean over valid tokens (zeros where there is none).
    An image without any valid token has no text at all.
    """

    tokens: Tensor
    valid: Tensor
    pooled: Tensor

    @staticmethod
    def collate(states: Sequence[Tensor]) -> TextContext:
        """states: one [t, C] per caption, t >= 1. Pads to the longest."""
        length = max(state.shape[0] for state in states)
        tokens = states[0].new_zeros(len(states), length, states[0].shape[1])
        valid = torch.zeros(len(states), length, dtype=torch.bool, device=tokens.device)
        for row, state in enumerate(states):
            tokens[row, : state.shape[0]] = state
            valid[row, : state.shape[0]] = True
        pooled = torch.stack([state.float().mean(0) for state in states]).to(tokens.dtype)
        return TextContext(tokens, valid, pooled)

    def to(self, device: torch.device | str) -> TextContext:
        return TextContext(self.tokens.to(device), self.valid.to(device), self.pooled.to(device))

    def dropped(self, drop: Tensor) -> TextContext:
        """drop: [B] bool. The rows that are True lose their text."""
        kept = ~drop
        return TextContext(self.tokens, self.valid & kept[:, None], self.pooled * kept[:, None].to(self.pooled.dtype))

    def repeated(self, times: int) -> TextContext:
        """Every row `times` times in a row: [B * times, ...]."""
        tokens, valid, pooled = (t.repeat_interleave(times, 0) for t in (self.tokens, self.valid, self.pooled))
        return TextContext(tokens, valid, pooled)

    def rows(self, chosen: Tensor) -> TextContext:
        """chosen: [m] int64 -> these captions alone."""
        return TextContext(self.tokens[chosen], self.valid[chosen], self.pooled[chosen])

    def __len__(self) -> int:
        return self.valid.shape[0]
