"""The backbone under guidance: which branches an iteration runs, and what it takes over from an earlier one.

With the condition cache (`SamplingConfig.uncond_refresh`), an iteration that runs all branches asks for every token
that is unmasked until the next such iteration (for all unknown ones, where the order decides as it goes). It keeps the
differences of the other branches' outputs to the full one's. Until then only the full branch runs, and the differences
are added to its output.

Shape letters: B images, G guidance branches, L image tokens, D width, n visible tokens, p tokens unmasked in one
iteration, P tokens unmasked until the next run of all branches (P >= p).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.context import Context
from models.sampling.config import BranchUse
from models.sampling.orders import PlannedOrder, iteration_ids


@dataclass(frozen=True)
class IterationPlan:
    """kept_ids: [B, n], visible, and token_ids: [B, p], to draw, both ascending. use: what becomes of the branches.
    asked_ids: [B, P], the tokens whose outputs a run of all branches computes. is_reused: whether the differences of
    this run are taken over by the next iteration."""

    kept_ids: Tensor
    token_ids: Tensor
    use: BranchUse
    asked_ids: Tensor
    is_reused: bool


def end_of_run(uses: Sequence[BranchUse], iteration: int) -> int:
    """The first iteration after this one that does not reuse what it ran."""
    end = iteration + 1
    while end < len(uses) and uses[end] == "reuse":
        end += 1
    return end


def plan_iterations(order: PlannedOrder, uses: Sequence[BranchUse]) -> list[IterationPlan]:
    """All iterations of an order that is known before the first. uses: `SamplingConfig.branch_uses`."""
    plans = []
    for iteration, use in enumerate(uses):
        kept_ids, token_ids = iteration_ids(order.orders, order.counts, iteration)  # [B, n], [B, p]
        end = end_of_run(uses, iteration) if use == "run" else iteration + 1
        until_next = order.orders[:, order.counts[end] : order.counts[iteration]]  # [B, P]
        is_reused = end > iteration + 1
        plans.append(IterationPlan(kept_ids, token_ids, use, until_next if is_reused else token_ids, is_reused))
    return plans


class GuidedBackbone:
    """Gives the head's conditions, iteration by iteration."""

    def __init__(self, num_branches: int) -> None:
        self.num_branches = num_branches
        self.difference: Tensor | None = None  # [G - 1, B, L, D], of the other branches to the full one

    def __call__(self, context: Context, tokens: Tensor, plan: IterationPlan) -> Tensor:
        """context: of all branches' images, the full one's first; tokens: [B, L, C]; gives [G, B, p, D], of the full
        branch alone [1, B, p, D] where only it counts."""
        if plan.use == "full only":
            return self._run(context.first(len(tokens)), 1, tokens, plan.kept_ids, plan.token_ids)  # [1, B, p, D]
        if plan.use == "run":
            z = self._run(context, self.num_branches, tokens, plan.kept_ids, plan.asked_ids)  # [G, B, P, D]
            if not plan.is_reused:
                return z
            by_place = z.new_zeros(*z.shape[:2], tokens.shape[1], z.shape[3])  # [G, B, L, D]
            by_place.scatter_(2, _places(plan.asked_ids, z), z)
            self.difference = by_place[1:] - by_place[:1]  # [G - 1, B, L, D]
            return by_place.gather(2, _places(plan.token_ids, by_place))  # [G, B, p, D]
        assert self.difference is not None, "a run comes before its differences are reused"
        full = self._run(context.first(len(tokens)), 1, tokens, plan.kept_ids, plan.token_ids)  # [1, B, p, D]
        others = full + self.difference.gather(2, _places(plan.token_ids, self.difference))  # [G - 1, B, p, D]
        return torch.cat([full, others])  # [G, B, p, D]

    def _run(self, context: Context, num_branches: int, tokens: Tensor, kept_ids: Tensor, ids: Tensor) -> Tensor:
        tokens, kept_ids, ids = (part.repeat(num_branches, *[1] * (part.dim() - 1)) for part in (tokens, kept_ids, ids))
        z = context.network.predict(tokens, kept_ids, context, ids)  # [G * B, P, D]
        return z.unflatten(0, (num_branches, -1))  # [G, B, P, D]


def _places(ids: Tensor, like: Tensor) -> Tensor:
    """ids [B, p] as an index into dimension 2 of [G, B, L, D]: [G, B, p, D]."""
    return ids[None, :, :, None].expand(like.shape[0], -1, -1, like.shape[3])
