"""How many tokens an iteration unmasks, and Halton-MaskGIT's order: laws, and the public codes' numbers."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from models.sampling.config import SCHEDULES
from models.sampling.orders import commit_steps, draw_orders
from models.sampling.schedules import masked_counts

SHAPES = ["root", "linear", "square", "cosine", "arccos"]


def read(shared: Path, name: str) -> dict[str, Any]:
    return json.loads((shared / "reference" / "maskgil" / name).read_text())


def tokens_of(grid: str) -> int:
    rows, columns = map(int, grid.split("x"))
    return rows * columns


def unmasked(schedule: str, num_tokens: int, num_iter: int) -> list[int]:
    return [now - after for now, after in pairwise(masked_counts(schedule, num_tokens, num_iter))]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_iteration_unmasks_at_least_one(schedule: str) -> None:
    """And all together all tokens, whatever the numbers of tokens and iterations."""
    for num_tokens in (1, 2, 3, 7, 16, 64):
        for num_iter in range(1, num_tokens + 1):
            counts = unmasked(schedule, num_tokens, num_iter)
            assert len(counts) == num_iter and sum(counts) == num_tokens and min(counts) >= 1
        with pytest.raises(ValueError, match=f"number of tokens, {num_tokens}, got {num_tokens + 1}"):
            masked_counts(schedule, num_tokens, num_tokens + 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_released_counts(shared: Path, shape: str) -> None:
    """Those of the released code where they are at least 1, else repaired."""
    fixture = read(shared, "schedules.json")
    for grid, shapes in fixture["counts"].items():
        for num_iter, expected in shapes[shape].items():
            found = unmasked(shape, tokens_of(grid), int(num_iter))
            assert found == (expected if isinstance(expected, list) else expected["repaired"]), (grid, num_iter)
    for num_tokens, shapes in fixture["remaining"].items():
        assert unmasked(shape, int(num_tokens), min(8, int(num_tokens))) == shapes[shape]


def test_other_public_counts(shared: Path) -> None:
    fixture = read(shared, "schedules.json")
    for grid, by_number in fixture["maskgit_cosine_still_masked"].items():
        for num_iter, expected in by_number.items():
            assert masked_counts("mar", tokens_of(grid), int(num_iter)) == expected
    for grid, by_number in fixture["halton_counts"].items():
        for num_iter, expected in by_number.items():
            assert unmasked("halton", tokens_of(grid), int(num_iter)) == expected


def test_the_public_halton_order(shared: Path) -> None:
    """The same for all images, unmasked from its end."""
    for name, expected in read(shared, "halton.json").items():
        if isinstance(expected, list):
            rows, columns = map(int, name.split()[0].split("x"))
            orders = draw_orders("halton_fixed", 2, (rows, columns), [])
            assert orders.flip(1).tolist() == [expected, expected]


def test_raster_goes_row_by_row() -> None:
    assert draw_orders("raster", 1, (2, 3), []).tolist() == [[5, 4, 3, 2, 1, 0]]
    with pytest.raises(ValueError, match="to be planned, got 'confidence'"):
        draw_orders("confidence", 1, (2, 3), [])


def test_commit_steps() -> None:
    """By hand: of five tokens, 2 is known, 4 and 0 come first, 3 and 1 last."""
    orders = torch.tensor([[3, 1, 0, 4, 2], [0, 1, 2, 3, 4]])
    assert commit_steps(orders, [4, 2, 0]).tolist() == [[0, 1, -1, 1, 0], [1, 1, 0, 0, -1]]
