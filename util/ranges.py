"""Which numbers a flag takes, said where the flag is added: `add_argument("--epochs", type=positive_int, ...)`.

A range reads a number as `int` or `float` would. Whether the number lies inside is checked when everything is parsed
(`util.config.parse_checked`): a value from the command line, a YAML file, a preset or the parser's default is then held
to the same range, with the same message.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """The numbers from low to high. ends: "(" or ")" where the end itself is outside. NaN is in no range.

    kind: what reads the number. says: the rule in words, as it stands in a message: "--flag says, got value".
    """

    kind: type[int] | type[float]
    says: str
    low: float
    high: float = math.inf
    ends: str = "[)"

    def __call__(self, text: str) -> float:
        """The number that `text` states. Raises ValueError if it states none."""
        return self.kind(text)

    @property
    def __name__(self) -> str:
        """argparse writes it: "invalid int value: 'many'"."""
        return self.kind.__name__

    def holds(self, value: float) -> bool:
        is_above = value >= self.low if self.ends[0] == "[" else value > self.low
        is_below = value <= self.high if self.ends[1] == "]" else value < self.high
        return is_above and is_below


positive_int = Range(int, "must be positive", 1)
positive_float = Range(float, "must be positive", 0, ends="()")
nonnegative_int = Range(int, "must not be negative", 0)
nonnegative_float = Range(float, "must not be negative", 0)
finite_float = Range(float, "must be finite", -math.inf, ends="()")
fraction = Range(float, "must lie in [0, 1]", 0, 1, "[]")
fraction_below_one = Range(float, "must lie in [0, 1)", 0, 1, "[)")
positive_fraction = Range(float, "must lie in (0, 1]", 0, 1, "(]")


def check_ranges(actions: Sequence[argparse.Action], values: Mapping[str, Any]) -> None:
    """Raises ValueError naming the first flag with a number outside its range. A value of None is not checked."""
    for action in actions:
        if not isinstance(action.type, Range) or values[action.dest] is None:
            continue
        value = values[action.dest]
        for number in value if isinstance(value, list) else [value]:
            if not action.type.holds(number):
                raise ValueError(f"{action.option_strings[0]} {action.type.says}, got {number}")
