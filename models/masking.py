"""Which tokens are hidden, in training and while sampling: orders and counts, independent of what fills the tokens.

An order is a permutation of the L token positions. With m tokens masked, the first m of the order are the hidden ones,
so sampling unmasks an order from its end (MAR, arXiv:2406.11838, section 4.2). Training draws orders uniformly; those
that sampling may prefer are in `sampling/orders.py`. A trunk that sees all tokens may hide another number in each row.

Shape letters: B batch, L image tokens, m masked tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from models.config import MASK_SCHEDULES

MASK_RATIO_STD = 0.25


@dataclass(frozen=True)
class TokenMask:
    """masked: [B, L] bool, True where the token is hidden. num_masked: how many every row hides; the most of a row
    where `counts` has another number for each."""

    masked: Tensor
    num_masked: int
    counts: tuple[int, ...] | None = None

    def to(self, device: torch.device | str) -> TokenMask:
        return TokenMask(self.masked.to(device), self.num_masked, self.counts)

    @property
    def num_hidden(self) -> int:
        """Hidden tokens of all rows together."""
        return len(self.masked) * self.num_masked if self.counts is None else sum(self.counts)

    def masked_ids(self) -> Tensor:
        """Hidden positions, ascending: [B, m] int64, as many in every row. (A sort, not `nonzero`: no host sync.)"""
        assert self.counts is None, "rows that hide different numbers of tokens have no table of hidden positions"
        return torch.argsort((~self.masked).to(torch.uint8), dim=1, stable=True)[:, : self.num_masked]

    def hidden_rows(self) -> Tensor:
        """Hidden positions among those of all rows in turn, ascending: [num_hidden] int64 in 0 .. B * L - 1."""
        is_visible = (~self.masked).flatten().to(torch.uint8)  # [B * L]
        return torch.argsort(is_visible, stable=True)[: self.num_hidden]

    def kept_ids(self) -> Tensor:
        """Visible positions, ascending: [B, n] int64. A row with fewer visible tokens than others ends in L, which is
        no position."""
        num_tokens = self.masked.shape[1]
        num_kept = num_tokens - (self.num_masked if self.counts is None else min(self.counts))
        ids = torch.argsort(self.masked.to(torch.uint8), dim=1, stable=True)[:, :num_kept]  # [B, n]
        return ids if self.counts is None else ids.masked_fill(self.masked.gather(1, ids), num_tokens)


def sample_orders(batch_size: int, num_tokens: int, generators: Sequence[torch.Generator]) -> Tensor:
    """A random order per image: [B, L] int64 on the generators' device. One generator serves all, or one per image."""
    if len(generators) not in (1, batch_size):
        raise ValueError(f"need 1 or {batch_size} generators, got {len(generators)}")
    chosen = [generators[row % len(generators)] for row in range(batch_size)]
    return torch.stack([torch.randperm(num_tokens, generator=g, device=g.device) for g in chosen])


def mask_from_orders(orders: Tensor, num_masked: int) -> TokenMask:
    """orders: [B, L] int64. The first `num_masked` positions of each order are hidden."""
    masked = torch.zeros_like(orders, dtype=torch.bool)  # [B, L]
    return TokenMask(masked.scatter(1, orders[:, :num_masked], True), num_masked)


def mask_ratio(schedule: str, uniform: float, mask_ratio_min: float) -> float:
    """The share of hidden tokens that a number drawn uniformly from [0, 1) stands for.

    truncnorm: MAR's Gaussian (mean 1, std 0.25) truncated to [mask_ratio_min, 1]. The others are MaskGIL's, from 0 to
    1: linear r, square r^2, cosine cos(r pi / 2), arccos acos(r) / (pi / 2); mask_ratio_min does not concern them.
    """
    if schedule == "truncnorm":
        low = (mask_ratio_min - 1.0) / MASK_RATIO_STD
        return float(stats.truncnorm.ppf(uniform, low, 0.0, loc=1.0, scale=MASK_RATIO_STD))
    if schedule == "linear":
        return uniform
    if schedule == "square":
        return uniform**2
    if schedule == "cosine":
        return math.cos(uniform * math.pi / 2)
    if schedule == "arccos":
        return math.acos(uniform) / (math.pi / 2)
    raise ValueError(f"mask_schedule must be one of {MASK_SCHEDULES}, got {schedule!r}")


def num_masked_at(schedule: str, uniform: float, num_tokens: int, mask_ratio_min: float) -> int:
    """At least one token; truncnorm rounds up, as MAR does, the others to the nearest."""
    share = num_tokens * mask_ratio(schedule, uniform, mask_ratio_min)
    return min(num_tokens, max(1, math.ceil(share) if schedule == "truncnorm" else round(share)))


def sample_num_masked(
    num_tokens: int, mask_ratio_min: float, generator: torch.Generator, schedule: str = "truncnorm"
) -> int:
    """Draws how many tokens to hide (`mask_ratio`)."""
    uniform = float(torch.rand((), dtype=torch.float64, generator=generator))
    return num_masked_at(schedule, uniform, num_tokens, mask_ratio_min)


def sample_token_mask(
    batch_size: int,
    num_tokens: int,
    mask_ratio_min: float,
    generator: torch.Generator,
    schedule: str = "truncnorm",
    per_image: bool = False,
) -> TokenMask:
    """One random order per image, and one mask ratio for the batch, or one per image."""
    if not per_image:
        num_masked = sample_num_masked(num_tokens, mask_ratio_min, generator, schedule)
        return mask_from_orders(sample_orders(batch_size, num_tokens, [generator]), num_masked)
    uniforms = torch.rand(batch_size, dtype=torch.float64, generator=generator, device=generator.device).tolist()
    counts = tuple(num_masked_at(schedule, uniform, num_tokens, mask_ratio_min) for uniform in uniforms)
    orders = sample_orders(batch_size, num_tokens, [generator])  # [B, L]
    ranks = orders.argsort(dim=1)  # [B, L], of each position in its row's order
    masked = ranks < torch.tensor(counts, device=orders.device)[:, None]  # [B, L]
    return TokenMask(masked, max(counts), counts)


def require_fitting_iterations(num_iter: int, num_tokens: int) -> None:
    """Raises ValueError naming both if there are too few tokens for each iteration to unmask at least one."""
    if not 1 <= num_iter <= num_tokens:
        raise ValueError(f"num_iter must lie between 1 and the number of tokens, {num_tokens}, got {num_iter}")


def cosine_masked_counts(num_tokens: int, num_iter: int) -> list[int]:
    """How many tokens are hidden before iteration 0, 1, ..., num_iter - 1, and (0) at the end: num_iter + 1 numbers.

    MaskGIT's cosine schedule as MAR runs it: at least one token is unmasked per iteration, at least one is left for
    the last.
    """
    require_fitting_iterations(num_iter, num_tokens)
    counts = [num_tokens]
    for step in range(1, num_iter):
        cosine = math.floor(num_tokens * math.cos(math.pi / 2 * step / num_iter))
        counts.append(max(1, min(counts[-1] - 1, cosine)))
    return [*counts, 0]
