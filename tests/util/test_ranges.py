"""Ranges of numbers: which hold, what they read, and what a flag outside its own is told."""

from __future__ import annotations

import argparse
import math

import pytest

from util.config import parse_checked
from util.ranges import (
    Range,
    Text,
    check_ranges,
    device_name,
    fraction,
    fraction_below_one,
    nonnegative_float,
    nonnegative_int,
    positive_float,
    positive_fraction,
    positive_int,
    some_text,
    text_or_none,
    whole,
)


@pytest.mark.parametrize(
    ("numbers", "inside", "outside"),
    [
        (positive_int, [1, 2, 10**9], [0, -1, 10**30]),
        (positive_float, [1e-300, 1.0], [0.0, -1e-300, 1e30, math.inf]),
        (nonnegative_int, [0, 1], [-1, 2**70]),
        (nonnegative_float, [0.0, 1e12], [-1e-300, 1e300, math.inf]),
        (fraction, [0.0, 0.5, 1.0], [-1e-9, 1.0 + 1e-9]),
        (fraction_below_one, [0.0, 1.0 - 1e-9], [-1e-9, 1.0]),
        (positive_fraction, [1e-9, 1.0], [0.0, 1.0 + 1e-9]),
        (Range(float, "", 0, math.inf), [0.0, math.inf], [-1e-9]),
    ],
)
def test_what_holds(numbers: Range, inside: list[float], outside: list[float]) -> None:
    assert all(numbers.holds(value) for value in inside)
    assert not any(numbers.holds(value) for value in [*outside, math.nan])


@pytest.mark.parametrize(
    ("rule", "inside", "outside"),
    [
        (device_name, ["auto", "cpu", "cuda", "cuda:3"], ["", "tpu", "cuda:", "cuda:x", "cpu ", "mps"]),
        (some_text, ["a", "./a b", " a"], ["", " ", "\n", "a\0"]),
        (text_or_none, ["", "a"], [" ", "\t", "\0"]),
    ],
)
def test_what_texts_hold(rule: Text, inside: list[str], outside: list[str]) -> None:
    assert all(rule.holds(value) for value in inside)
    assert not any(rule.holds(value) for value in outside)


def test_messages_are_short_and_name_the_side() -> None:
    assert positive_int.complaint(0) == "must be positive, got 0"
    assert positive_int.complaint(10**10) == "must be at most 1000000000, got 10000000000"
    assert positive_int.complaint(10**5000) == "must be at most 1000000000, got a number of 5001 digits"
    assert whole(1, 9).complaint(10) == "must be at most 9, got 10"
    assert whole(2, 9).complaint(10) == "must lie in 2 ... 9, got 10"
    assert len(device_name.complaint("x" * 5000)) < 300
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        positive_int("9" * 5000)
    assert len(str(caught.value)) < 300


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="program")
    result.add_argument("--steps", type=positive_int, default=3)
    result.add_argument("--share", type=fraction, default=None)
    result.add_argument("--seeds", type=nonnegative_int, nargs="+", default=[0])
    result.add_argument("--name", default="")
    return result


def test_numbers_are_read_as_their_kind() -> None:
    args = parse_checked(parser(), ["--steps", "5", "--share", "1", "--seeds", "0", "7"])
    assert (args.steps, args.share, args.seeds) == (5, 1.0, [0, 7])
    assert isinstance(args.steps, int) and isinstance(args.share, float)
    assert parse_checked(parser(), []).share is None


def test_what_is_no_number_is_argparses_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_checked(parser(), ["--steps", "2.5"])
    assert caught.value.code == 2
    assert "argument --steps: invalid int value: '2.5'" in capsys.readouterr().err


def test_a_number_out_of_range_is_one_line() -> None:
    with pytest.raises(SystemExit) as caught:
        parse_checked(parser(), ["--seeds", "0", "-7"])
    assert caught.value.code == "program: error: --seeds must not be negative, got -7"


def test_the_first_flag_outside_is_named() -> None:
    with pytest.raises(ValueError, match=r"^--share must lie in \[0, 1\], got nan$"):
        check_ranges(parser()._actions, {"steps": 1, "share": math.nan, "seeds": [-1], "name": "x", "help": None})
