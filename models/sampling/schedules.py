"""How many tokens each iteration unmasks.

`mar` is MAR's cosine (`masking.py`). `root`, `linear`, `square`, `cosine` and `arccos` are MaskGIL's: with u falling
evenly from 1 to 0, iteration s gets a share of 1 - sqrt(u), 1 - u, 1 - u^2, cos(u pi / 2) or acos(u) / (pi / 2), at
least one token, and the last one what is left. With many iterations too little is left: the released code then gives
less than one. Here the largest counts give one each until the last iteration has one, so that every number of
iterations up to that of the tokens works, and the others are as released. `halton` is Halton-MaskGIT's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from models.masking import cosine_masked_counts, require_fitting_iterations


def masked_counts(schedule: str, num_tokens: int, num_iter: int) -> list[int]:
    """How many tokens are masked before iteration 0, 1, ..., and (0) at the end: num_iter + 1 falling numbers.

    schedule: of `config.SCHEDULES`. Raises ValueError naming both if there are more iterations than tokens.
    """
    if schedule == "mar":
        return cosine_masked_counts(num_tokens, num_iter)
    require_fitting_iterations(num_iter, num_tokens)
    is_halton = schedule == "halton"
    counts = _halton_counts(num_tokens, num_iter) if is_halton else unmasked_counts(schedule, num_tokens, num_iter)
    return list(accumulate(counts, lambda masked, count: masked - count, initial=num_tokens))


def unmasked_counts(shape: str, num_tokens: int, num_iter: int) -> list[int]:
    """Tokens that each iteration unmasks by one of MaskGIL's five shapes, at least 1 each."""
    if num_iter == 1:
        return [num_tokens]
    shares = _shares(shape, torch.linspace(1, 0, num_iter, dtype=torch.float32))  # [S]
    rounded = (shares / shares.sum() * num_tokens).round().int().tolist()  # halves to even, as released
    counts = [max(1, count) for count in rounded[:-1]]
    left = num_tokens - sum(counts)
    while left < 1:
        largest = max(counts)
        counts[_last_of(counts, largest)] -= 1
        left += 1
    return [*counts, left]


def _shares(shape: str, u: Tensor) -> Tensor:
    """Up to a factor; u and the result: [S]."""
    if shape == "root":
        return 1 - u.sqrt()
    if shape == "linear":
        return 1 - u
    if shape == "square":
        return 1 - u.square()
    if shape == "cosine":
        return torch.cos(u * (math.pi / 2))
    assert shape == "arccos", shape
    return torch.acos(u) / (math.pi / 2)


def _last_of(counts: Sequence[int], value: int) -> int:
    return max(index for index, count in enumerate(counts) if count == value)


def _halton_counts(num_tokens: int, num_iter: int) -> list[int]:
    """Nearly even at first, and many at the end."""
    known = [0]
    for step in range(1, num_iter + 1):
        share = 1 - math.acos(step / num_iter) / (math.pi / 2)
        known.append(max(step, int(num_tokens * share)))
    return [after - before for before, after in pairwise(known)]
