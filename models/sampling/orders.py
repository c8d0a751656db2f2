"""In which order tokens are unmasked: what is decided before the first iteration, or as sampling goes.

An order is asked in every iteration which tokens to unmask next. Orders that do not look at what was drawn are
permutations of the token positions, unmasked from their end, and are planned before the loop: `random`; `gtr` unmasks
one colour of a checkerboard before the other (the order of Generation then Reconstruction, without its schedule);
`halton` spreads any first tokens evenly (arXiv:2503.17076), another shift in each image, `halton_fixed` is the public
code's, the same in all; `raster` goes row by row. `confidence` unmasks what was drawn with the surest choice (MaskGIT,
arXiv:2202.04200).

Shape letters: B images, L image tokens, C token channels, p tokens unmasked in one iteration, u tokens unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from models.masking import TokenMask, sample_orders
from models.sampling.config import ORDERS

PLANNED = tuple(kind for kind in ORDERS if kind != "confidence")


@dataclass(frozen=True)
class DecodeState:
    """Where sampling stands before an iteration. tokens: [B, L, C], meaningless where not known. known: [B, L] bool,
    the same number in every row. iteration: from 0. num_masked: unknown tokens of a row. generators: one an image."""

    tokens: Tensor
    known: Tensor
    iteration: int
    num_masked: int
    generators: Sequence[torch.Generator]

    def known_ids(self) -> Tensor:
        """Ascending: [B, L - u] int64."""
        return TokenMask(~self.known, self.num_masked).kept_ids()

    def unknown_ids(self) -> Tensor:
        """Ascending: [B, u] int64."""
        return TokenMask(~self.known, self.num_masked).masked_ids()


class Order(Protocol):
    """counts: how many tokens are masked before each iteration, and (0) at the end. uses_confidence: all unknown tokens
    are drawn in every iteration, and `next` says which to keep; else `next` is asked before, and those are drawn."""

    @property
    def counts(self) -> Sequence[int]: ...

    @property
    def uses_confidence(self) -> bool: ...

    def next(self, state: DecodeState, confidence: Tensor | None) -> Tensor:
        """The tokens to unmask in `state.iteration`: [B, p] int64, ascending, none of them known, p as the counts say.

        confidence: [B, u] of the unknown tokens as drawn in this iteration, where `uses_confidence`; else None.
        """


@dataclass(frozen=True)
class PlannedOrder:
    """An order that was decided before the first iteration. orders: [B, L], unmasked from the end."""

    orders: Tensor
    counts: Sequence[int]
    uses_confidence: bool = False

    def next(self, state: DecodeState, confidence: Tensor | None = None) -> Tensor:
        """See `Order`."""
        return iteration_ids(self.orders, self.counts, state.iteration)[1]


@dataclass(frozen=True)
class ConfidenceOrder:
    """Unmasks the unknown tokens of the highest confidence."""

    counts: Sequence[int]
    uses_confidence: bool = True

    def next(self, state: DecodeState, confidence: Tensor | None) -> Tensor:
        """See `Order`."""
        assert confidence is not None, "this order goes by confidence"
        num_next = self.counts[state.iteration] - self.counts[state.iteration + 1]
        surest = confidence.topk(num_next, dim=1).indices  # [B, p]
        return state.unknown_ids().gather(1, surest).sort(dim=1).values  # [B, p]


def commit_steps(orders: Tensor, counts: Sequence[int]) -> Tensor:
    """The iteration that unmasks each token, -1 where it was known before: [B, L] int64. orders: [B, L]; counts: as an
    order's, from the number of unknown tokens to 0."""
    sizes = [now - after for now, after in pairwise(counts)]
    by_rank = [step for step in reversed(range(len(sizes))) for _ in range(sizes[step])]
    by_rank += [-1] * (orders.shape[1] - len(by_rank))
    steps = torch.tensor(by_rank, dtype=torch.int64).to(orders.device).expand_as(orders)  # [B, L], along the order
    return torch.empty_like(orders).scatter(1, orders, steps)  # [B, L]


def iteration_ids(orders: Tensor, counts: Sequence[int], iteration: int) -> tuple[Tensor, Tensor]:
    """The tokens visible in an iteration [B, L - now] and those it unmasks [B, p], ascending. orders: [B, L]."""
    now, after = counts[iteration], counts[iteration + 1]
    return orders[:, now:].sort(dim=1).values, orders[:, after:now].sort(dim=1).values


def unknown_first(orders: Tensor, known: Tensor) -> Tensor:
    """Orders [B, L] with the known tokens [B, L] bool moved to the end, as if they had been unmasked before."""
    is_known = known.gather(1, orders).to(torch.uint8)  # [B, L]
    return orders.gather(1, is_known.argsort(dim=1, stable=True))  # [B, L]


def draw_orders(kind: str, batch_size: int, grid: tuple[int, int], generators: Sequence[torch.Generator]) -> Tensor:
    """An order per image to sample in, `kind` of `config.ORDERS`: [B, L] int64. grid: (rows, columns) of the tokens.

    gtr: a random order, each token of one colour before (nearer the end than) the other's. halton: one fixed sequence,
    shifted at random over the grid, which wraps around. raster and halton_fixed draw nothing. Raises ValueError for a
    kind that is no planned order.
    """
    rows, columns = grid
    if kind not in PLANNED:
        raise ValueError(f"order must be one of {PLANNED} to be planned, got {kind!r}")
    if kind in ("raster", "halton_fixed"):
        cells = torch.tensor(halton_cells(rows, columns, start=1))  # [L, 2]
        ids = cells[:, 0] * columns + cells[:, 1] if kind == "halton_fixed" else torch.arange(rows * columns)  # [L]
        return ids.flip(0).expand(batch_size, -1)  # [B, L]
    if kind == "halton":
        cells = torch.tensor(halton_cells(rows, columns))  # [L, 2]
        shifts = torch.stack([torch.randint(rows * columns, (), generator=g, device=g.device) for g in generators])
        row = (cells[:, 0].to(shifts.device) + shifts[:, None] // columns) % rows  # [B, L]
        column = (cells[:, 1].to(shifts.device) + shifts[:, None]) % columns  # [B, L]
        return (row * columns + column).flip(1)  # [B, L]
    orders = sample_orders(batch_size, rows * columns, generators)  # [B, L]
    if kind == "gtr":
        is_first = (orders // columns + orders % columns) % 2  # [B, L]
        return orders.gather(1, is_first.argsort(dim=1, stable=True))  # [B, L]
    return orders


@lru_cache
def halton_cells(rows: int, columns: int, start: int = 0) -> list[tuple[int, int]]:
    """All (row, column) of a grid in the order in which the two-dimensional Halton sequence first hits them, from its
    point number `start` on."""
    cells: dict[tuple[int, int], None] = {}
    index = start
    while len(cells) < rows * columns:
        cells[int(rows * _radical_inverse(index, 2)), int(columns * _radical_inverse(index, 3))] = None
        index += 1
    return list(cells)


def _radical_inverse(index: int, base: int) -> float:
    """The digits of `index` mirrored at the point: 6 = 110 in base 2 gives 0.011 = 3/8."""
    value, scale = 0.0, 1.0 / base
    while index:
        index, digit = divmod(index, base)
        value += digit * scale
        scale /= base
    return value
