"""Units and the trunk's tokens: where s x s units, each hidden and drawn on its own, make one token.

Units lie in raster order over the whole (rows * s, columns * s) grid, tokens over the (rows, columns) grid, and within
a token its units again in raster order.

Shape letters: B batch, L tokens, U units, s units along a token's side, p units asked for.
"""

from __future__ import annotations

from torch import Tensor


def group_units(x: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Units by the token they lie in. x: [B, U, ...]; grid: (rows, columns) of tokens; returns [B, L, s * s, ...]."""
    rows, columns = grid
    x = x.unflatten(1, (rows, side, columns, side)).transpose(2, 3)  # [B, rows, columns, s, s, ...]
    return x.flatten(3, 4).flatten(1, 2)  # [B, L, s * s, ...]


def ungroup_units(x: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """The inverse of `group_units`. x: [B, L, s * s, ...]; returns [B, U, ...]."""
    x = x.unflatten(2, (side, side)).unflatten(1, grid).transpose(2, 3)  # [B, rows, s, columns, s, ...]
    return x.flatten(1, 4)  # [B, U, ...]


def owners_of(unit_ids: Tensor, grid: tuple[int, int], side: int) -> tuple[Tensor, Tensor]:
    """The token that each unit lies in, and the unit's place in it (below s * s). unit_ids: [B, p]; both [B, p]."""
    columns = grid[1]
    row, column = unit_ids // (columns * side), unit_ids % (columns * side)  # [B, p] each
    owners = row // side * columns + column // side  # [B, p]
    return owners, row % side * side + column % side
