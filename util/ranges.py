"""Which values a flag takes, said where the flag is added: `add_argument("--epochs", type=positive_int, ...)`.

A range reads a number as `int` or `float` would. Whether the number lies inside is checked when everything is parsed
(`util.config.parse_checked`): a value from the command line, a YAML file, a preset or the parser's default is then held
to the same range, with the same message. Every range ends somewhere: beyond it a program would hang or run out of
memory, or the number is a slip of the pen.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from util.read import short_repr

MANY = 10**9  # of things that are only counted
LARGEST = 1e12  # of factors and weights


@dataclass(frozen=True)
class Range:
    """The numbers from low to high. ends: "(" or ")" where the end itself is outside. NaN is in no range.

    kind: what reads the number. says: the rule in words, as it stands in a message: "--flag says, got value".
    """

    kind: type[int] | type[float]
    says: str
    low: float
    high: float
    ends: str = "[]"
    takes_none: bool = False  # the word "none" stands for None

    def __call__(self, text: str) -> float | None:
        """The number that `text` states. Raises ArgumentTypeError if it states none."""
        if self.takes_none and text.strip().lower() == "none":
            return None
        try:
            return self.kind(text)
        except ValueError as error:
            reason = f"invalid {self.__name__} value: {short_repr(text)}"
            raise argparse.ArgumentTypeError(reason) from error

    @property
    def __name__(self) -> str:
        """What the number is called in messages."""
        return self.kind.__name__

    def holds(self, value: float) -> bool:
        """Whether the number lies inside."""
        is_above = value >= self.low if self.ends[0] == "[" else value > self.low
        is_below = value <= self.high if self.ends[1] == "]" else value < self.high
        return is_above and is_below

    def complaint(self, value: float) -> str:
        """What a message says of a number outside."""
        says = f"must be at most {self.high}" if value > self.high and "lie in" not in self.says else self.says
        return f"{says}, got {_number(value)}"


@dataclass(frozen=True)
class Text:
    """The texts that a pattern matches as a whole. says: the rule in words, as it stands in a message."""

    says: str
    pattern: str
    kind: type[str] = str

    def __call__(self, text: str) -> str:
        return text

    def holds(self, value: str) -> bool:
        """Whether the pattern matches."""
        return re.fullmatch(self.pattern, value) is not None

    def complaint(self, value: str) -> str:
        """What a message says of another text."""
        return f"{self.says}, got {short_repr(value)}"


def or_none(numbers: Range) -> Range:
    """The same numbers, or "none", which undoes what a file or the weights say."""
    return replace(numbers, takes_none=True)


def whole(low: int, high: int) -> Range:
    """The whole numbers from low to high."""
    says = {1: "must be positive", 0: "must not be negative"}.get(low, f"must lie in {low} ... {high}")
    return Range(int, says, low, high)


positive_int = Range(int, "must be positive", 1, MANY)
positive_float = Range(float, "must be positive", 0, LARGEST, "(]")
nonnegative_int = Range(int, "must not be negative", 0, MANY)
nonnegative_float = Range(float, "must not be negative", 0, LARGEST)
fraction = Range(float, "must lie in [0, 1]", 0, 1)
fraction_below_one = Range(float, "must lie in [0, 1)", 0, 1, "[)")
positive_fraction = Range(float, "must lie in (0, 1]", 0, 1, "(]")
batch_int = whole(1, 65536)  # things held in memory at a time
threads_int = whole(1, 512)
workers_int = whole(0, 256)
pixels_int = whole(1, 4096)  # side of a square picture
width_int = whole(1, 16384)  # channels
depth_int = whole(1, 256)  # layers

MAX_SEED = 2**62 - 1  # seed + k stays below 2^63
seed_int = Range(int, f"must lie in 0 ... {MAX_SEED}", 0, MAX_SEED)

device_name = Text("must be auto, cpu, cuda or cuda:N", r"auto|cpu|cuda(:\d{1,3})?")
picture_size = Text("must be HEIGHTxWIDTH in pixels, like 96x64", r"[1-9]\d{0,3}x[1-9]\d{0,3}")
some_text = Text("must not be empty", r"(?s)[^\0]*[^\s\0][^\0]*")
text_or_none = Text("must not be blank", r"(?s)|[^\0]*[^\s\0][^\0]*")  # "" stands for none


def check_ranges(actions: Sequence[argparse.Action], values: Mapping[str, Any]) -> None:
    """Raises ValueError naming the first flag with a value outside its range. A value of None is not checked."""
    for action in actions:
        rule, value = _rule_of(action), values.get(action.dest)
        if rule is None or value is None:
            continue
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str) == isinstance(rule, Text) and not rule.holds(each):
                raise ValueError(f"{(*action.option_strings, action.dest)[0]} {rule.complaint(each)}")


def _rule_of(action: argparse.Action) -> Range | Text | None:
    """The flag's own, or that of texts: paths and names are not blank, nor empty where that does not mean none."""
    if isinstance(action.type, Range | Text):
        return action.type
    if action.type is not None or action.choices is not None or not isinstance(action, argparse._StoreAction):
        return None
    return text_or_none if action.default in (None, "") and not action.required else some_text


def _number(value: float) -> str:
    """A number for a message. Python writes no whole number of more than 4,300 digits."""
    if isinstance(value, int) and abs(value) >= 10**40:
        return f"a number of {math.floor(math.log10(abs(value))) + 1} digits"
    return str(value)
