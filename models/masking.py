"""Which tokens are hidden, in training and while sampling: orders and counts, independent of what fills the tokens.

An order is a permutation of the L token positions. With m tokens masked, the first m of the order are the hidden ones,
so sampling unmasks an order from its end (MAR, arXiv:2406.11838, section 4.2). Training draws orders uniformly; those
that sampling may prefer are in `sampling/orders.py`.

Shape letters: B batch, L image tokens, m masked tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

MASK_RATIO_STD = 0.25


@dataclass(frozen=True)
class TokenMask:
    """masked: [B, L] bool, True where the token is hidden; every row hides the same number, `num_masked`."""

    masked: Tensor
    num_masked: int

    def to(self, device: torch.device | str) -> TokenMask:
        return TokenMask(self.masked.to(device), self.num_masked)

    def masked_ids(self) -> Tensor:
        """Hidden positions, ascending: [B, m] int64. (A sort, not `nonzero`: no host sync.)"""
        return torch.argsort((~self.masked).to(torch.uint8), dim=1, stable=True)[:, : self.num_masked]

    def kept_ids(self) -> Tensor:
        """Visible positions, ascending: [B, L - m] int64."""
        num_kept = self.masked.shape[1] - self.num_masked
        return torch.argsort(self.masked.to(torch.uint8), dim=1, stable=True)[:, :num_kept]


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


def sample_num_masked(num_tokens: int, mask_ratio_min: float, generator: torch.Generator) -> int:
    """Draws the ratio from a Gaussian (mean 1, std 0.25) truncated to [mask_ratio_min, 1], as MAR does; rounds up."""
    uniform = float(torch.rand((), dtype=torch.float64, generator=generator))
    low = (mask_ratio_min - 1.0) / MASK_RATIO_STD
    ratio = float(stats.truncnorm.ppf(uniform, low, 0.0, loc=1.0, scale=MASK_RATIO_STD))
    return min(num_tokens, max(1, math.ceil(num_tokens * ratio)))


def sample_token_mask(batch_size: int, num_tokens: int, mask_ratio_min: float, generator: torch.Generator) -> TokenMask:
    """One mask ratio for the batch, one random order per image."""
    num_masked = sample_num_masked(num_tokens, mask_ratio_min, generator)
    return mask_from_orders(sample_orders(batch_size, num_tokens, [generator]), num_masked)


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
