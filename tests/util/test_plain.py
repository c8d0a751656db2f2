"""Dataclasses from plain values: defaults for what is missing, one clear line for what is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from util.plain import from_plain


@dataclass(frozen=True)
class Settings:
    count: int
    share: float = 0.5
    bound: float | None = None
    name: str = "a"
    is_on: bool = False
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")


def test_missing_fields_have_their_defaults() -> None:
    assert from_plain(Settings, {"count": 2}, "here") == Settings(2)


def test_lists_are_tuples_and_ints_are_floats() -> None:
    values = {"count": 2, "share": 1, "bound": 3, "interval": [0, 0.5]}
    assert from_plain(Settings, values, "here") == Settings(2, 1.0, 3.0, interval=(0.0, 0.5))
    assert from_plain(Settings, {"count": 2, "bound": None}, "here").bound is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 2, "counts": 3, 4: 5}, r"here: unknown fields \['4', 'counts'\]"),
        ({}, "here: .*missing 1 required positional argument: 'count'"),
        ({"count": True}, "here: count must be int, got True"),
        ({"count": 2.0}, "here: count must be int, got 2.0"),
        ({"count": 1, "share": "0.5"}, "here: share must be float, got '0.5'"),
        ({"count": 1, "share": None}, "here: share must be float, got None"),
        ({"count": 1, "bound": "x"}, r"here: bound must be float \| None, got 'x'"),
        ({"count": 1, "is_on": 1}, "here: is_on must be bool, got 1"),
        ({"count": 1, "interval": [0.1]}, r"here: interval must be tuple\[float, float\], got \[0.1\]"),
        ({"count": 0}, "here: count must be at least 1, got 0"),
        ([1], r"here: expected names and values, got \[1\]"),
    ],
)
def test_mistakes_are_named(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_plain(Settings, values, "here")
