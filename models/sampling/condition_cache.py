"""The backbone under guidance: which branches an iteration runs, and what it takes over from an earlier one.

With the condition cache (`SamplingConfig.uncond_refresh`) a run of all branches asks for every token that is uncovered
until the next run, and keeps what the other branches' outputs differ by from the full one's; until then only the full
branch runs, and the differences are added to it.

Shape letters: B images, G guidance branches, L image tokens, D width, n visible tokens, p tokens uncovered in one
iteration, P tokens uncovered until the next run (P >= p).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.sampling.config import BranchUse
from models.sampling.prepared import Prepared, predict_tokens


@dataclass(frozen=True)
class Pass:
    """One iteration. kept_ids: [B, n], visible, and token_ids: [B, p], to uncover, both ascending. use: what becomes of
    the branches. asked_ids: [B, P], what a run asks for."""

    kept_ids: Tensor
    token_ids: Tensor
    use: BranchUse
    asked_ids: Tensor


def iteration_ids(orders: Tensor, counts: Sequence[int], iteration: int) -> tuple[Tensor, Tensor]:
    """The tokens visible in an iteration [B, L - now] and those it uncovers [B, p], ascending. orders: [B, L]."""
    now, after = counts[iteration], counts[iteration + 1]
    return orders[:, now:].sort(dim=1).values, orders[:, after:now].sort(dim=1).values


def end_of_run(uses: Sequence[BranchUse], iteration: int) -> int:
    """The first iteration after this one that does not reuse what it ran."""
    end = iteration + 1
    while end < len(uses) and uses[end] == "reuse":
        end += 1
    return end


def plan_passes(orders: Tensor, counts: Sequence[int], uses: Sequence[BranchUse]) -> list[Pass]:
    """orders: [B, L]; counts: `cosine_masked_counts`; uses: `SamplingConfig.branch_uses`."""
    passes = []
    for iteration, use in enumerate(uses):
        kept_ids, token_ids = iteration_ids(orders, counts, iteration)  # [B, n], [B, p]
        end = end_of_run(uses, iteration) if use == "run" else iteration + 1
        asked = orders[:, counts[end] : counts[iteration]] if end > iteration + 1 else token_ids  # [B, P]
        passes.append(Pass(kept_ids, token_ids, use, asked))
    return passes


class GuidedBackbone:
    """Gives the head's conditions, pass by pass."""

    def __init__(self, prepared: Prepared, num_branches: int, passes: Sequence[Pass]) -> None:
        """prepared: of all branches' images, the full one's first; passes: those to come."""
        self.num_branches = num_branches
        self.every = self.full = prepared
        if any(step.use != "run" for step in passes):
            self.full = prepared.first(len(prepared.conditions.base) // num_branches)
        self.difference: Tensor | None = None  # [G - 1, B, L, D], of the other branches to the full one

    def __call__(self, tokens: Tensor, step: Pass) -> Tensor:
        """tokens: [B, L, C]; gives [G, B, p, D], of the full branch alone [1, B, p, D] where only it counts."""
        if step.use == "full only":
            return self._run(self.full, 1, tokens, step.kept_ids, step.token_ids)  # [1, B, p, D]
        if step.use == "run":
            z = self._run(self.every, self.num_branches, tokens, step.kept_ids, step.asked_ids)  # [G, B, P, D]
            if step.asked_ids is step.token_ids:
                return z
            by_place = z.new_zeros(*z.shape[:2], tokens.shape[1], z.shape[3])  # [G, B, L, D]
            by_place.scatter_(2, _places(step.asked_ids, z), z)
            self.difference = by_place[1:] - by_place[:1]  # [G - 1, B, L, D]
            return by_place.gather(2, _places(step.token_ids, by_place))  # [G, B, p, D]
        assert self.difference is not None, "a run comes before its differences are reused"
        full = self._run(self.full, 1, tokens, step.kept_ids, step.token_ids)  # [1, B, p, D]
        others = full + self.difference.gather(2, _places(step.token_ids, self.difference))  # [G - 1, B, p, D]
        return torch.cat([full, others])  # [G, B, p, D]

    def _run(self, prepared: Prepared, num_branches: int, tokens: Tensor, kept_ids: Tensor, ids: Tensor) -> Tensor:
        inputs = (part.repeat(num_branches, *[1] * (part.dim() - 1)) for part in (tokens, kept_ids, ids))
        return predict_tokens(prepared, *inputs).unflatten(0, (num_branches, -1))  # [G, B, ., D]


def _places(ids: Tensor, like: Tensor) -> Tensor:
    """ids [B, p] as an index into dimension 2 of [G, B, L, D]: [G, B, p, D]."""
    return ids[None, :, :, None].expand(like.shape[0], -1, -1, like.shape[3])
