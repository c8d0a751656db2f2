"""Who attends to whom, where causality is not all of it: blocks whose positions see each other both ways.

    allowed(i, j) = valid(j) and (j <= i or block(i) = block(j) >= 0), or i = j

Masks are boolean, True for "attends", in four dimensions, as the `sdpa` attention takes them. A bias on attention needs
a mask of floating point: the bias where attention is allowed, -inf elsewhere. Every position sees itself, also a
padded one, whose row of attention would be empty otherwise.

Shape letters: B batch, q positions that look, k positions that are looked at (the last q of them look).
"""

from __future__ import annotations

import torch
from torch import Tensor

NO_BLOCK = -1


def attention_mask(valid: Tensor, blocks: Tensor, num_queries: int) -> Tensor:
    """valid: [B, k] bool; blocks: [k] int64, the number of each position's block, `NO_BLOCK` for none. Gives
    [B, 1, q, k] bool."""
    num_keys = valid.shape[1]
    keys = torch.arange(num_keys, device=valid.device)  # [k]
    queries = keys[num_keys - num_queries :]  # [q]
    is_before = keys[None] <= queries[:, None]  # [q, k]
    is_same_block = (blocks[queries, None] == blocks[None]) & (blocks[None] != NO_BLOCK)  # [q, k]
    allowed = (is_before | is_same_block) & valid[:, None, None]  # [B, 1, q, k]
    return allowed | (keys[None] == queries[:, None])  # [B, 1, q, k]


def with_bias(mask: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask [B, 1, q, k] and what is added to the attention's logits, [B or 1, 1, q, k] -> [B, 1, q, k] of the
    queries' dtype. Raises ValueError for a bias of another number of positions, or one that is not finite."""
    if bias.dim() != 4 or bias.shape[2:] != mask.shape[2:]:
        raise ValueError(f"the bias is {tuple(bias.shape)}, the mask {tuple(mask.shape)}")
    if not bool(torch.isfinite(bias).all()):
        raise ValueError("the bias on attention is not finite, what may not be seen belongs to the mask")
    return bias.to(dtype).masked_fill(~mask, -torch.inf)  # [B, 1, q, k]
