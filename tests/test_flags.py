"""Every number that a program takes has a range, beside its flag, and none outside gets past the parser."""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.programs import PROGRAMS
from util.config import CONFIG_FLAG, parse_args
from util.ranges import Range

every_program = pytest.mark.parametrize("module", PROGRAMS)
Run = Callable[..., None]


class Caught(BaseException):
    """Ends a program where it parses its command line."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Calls a program's `main` with these words."""

    def call(module: str, *argv: str) -> None:
        monkeypatch.setattr("sys.argv", [module, *argv])
        importlib.import_module(module).main()

    return call


@pytest.fixture
def parser_of(run: Run) -> Callable[[str], argparse.ArgumentParser]:
    """The parser that a program uses."""

    def catch(module: str) -> argparse.ArgumentParser:
        def refuse(self: argparse.ArgumentParser, *_: Any) -> None:
            raise Caught(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", refuse)
            with pytest.raises(Caught) as caught:
                run(module)
        return caught.value.parser

    return catch


def ranged(parser: argparse.ArgumentParser) -> dict[str, tuple[argparse.Action, Range]]:
    """By flag."""
    return {each.option_strings[0]: (each, each.type) for each in parser._actions if isinstance(each.type, Range)}


def just_outside(numbers: Range) -> list[float]:
    """Below the low end and above the high one, where anything lies there."""
    ends = (numbers.low, -math.inf, numbers.ends[0] == "("), (numbers.high, math.inf, numbers.ends[1] == ")")
    if numbers.kind is int:
        return [int(end) + (0 if is_outside else int(math.copysign(1, to))) for end, to, is_outside in ends]
    found = [end if is_outside else math.nextafter(end, to) for end, to, is_outside in ends]
    return [value for value in found if not numbers.holds(value)]


def required_words(parser: argparse.ArgumentParser) -> list[str]:
    return [word for each in parser._actions if each.required for word in (*each.option_strings[:1], "x")]


def with_outsider(action: argparse.Action, value: float) -> Any:
    """As in a YAML file: `value`, or a list of which it is the last entry."""
    if action.nargs is None:
        return value
    others = action.nargs - 1 if isinstance(action.nargs, int) else 0
    return [*(action.default or [action.type.high] * others)[:others], value]


def spelled(flag: str, value: Any) -> list[str]:
    """As on the command line, where -1 and -0.5 are values, but -inf and -1e-6 are taken for flags."""
    if not isinstance(value, list):
        return [f"{flag}={value}"]
    return [flag, *(f"{each:.400f}" if isinstance(each, float) else str(each) for each in value)]


def test_there_is_something_to_check(parser_of: Callable[[str], argparse.ArgumentParser]) -> None:
    assert {"main_mar", "main_rl", "scripts.sample", "scripts.cache_latents", "scripts.mini.train_vae"} <= {*PROGRAMS}
    assert len(ranged(parser_of("main_mar"))) > 40


@every_program
def test_every_number_has_a_range_and_its_default_lies_inside(
    parser_of: Callable[[str], argparse.ArgumentParser], module: str
) -> None:
    parser = parser_of(module)
    assert [each.dest for each in parser._actions if each.type in (int, float)] == []
    for flag, (action, numbers) in ranged(parser).items():
        default = parser.get_default(action.dest)
        values = [] if default is None else default if isinstance(default, list) else [default]
        assert all(numbers.holds(value) for value in values), flag
        assert math.isfinite(numbers.high) or flag == "--layout_bias_value", flag


@every_program
def test_numbers_just_outside_are_refused(
    parser_of: Callable[[str], argparse.ArgumentParser],
    run: Run,
    module: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On the command line and, where a program reads one, from a YAML file, whose name is told then."""
    parser, config = parser_of(module), tmp_path / "config.yaml"
    needed = required_words(parser)
    for flag, (action, numbers) in ranged(parser).items():
        outsiders = just_outside(numbers)
        assert outsiders, flag
        for value in outsiders:
            given = with_outsider(action, numbers.kind(value))
            complaint = f"{flag} {numbers.complaint(numbers.kind(value))}"
            with pytest.raises(SystemExit) as caught:
                run(module, *needed, *spelled(flag, given))
            assert caught.value.code == f"{parser.prog}: error: {complaint}"
            if CONFIG_FLAG in parser._option_string_actions:
                config.write_text(yaml.safe_dump({action.dest: given}))
                with pytest.raises(SystemExit):
                    run(module, *needed, CONFIG_FLAG, str(config))
                said = capsys.readouterr().err
                assert said.startswith(f"{parser.prog}: error: config file {config}: {complaint}"), said


BAD = ["", "abc", "nan", "-1", "9" * 5000]


@every_program
def test_no_value_of_any_flag_is_more_than_one_line(
    parser_of: Callable[[str], argparse.ArgumentParser], capsys: pytest.CaptureFixture[str], module: str
) -> None:
    """Parsed alone: a value is taken, or refused in one line that names its flag."""
    parser = parser_of(module)
    needed = required_words(parser)
    for action in parser._actions:
        for value in BAD if action.option_strings and action.dest not in ("help", "config") else ():
            flag = action.option_strings[0]
            try:
                parse_args(parser, [*needed, f"{flag}={value}"])
                said = ""
            except SystemExit as end:
                said = end.code if isinstance(end.code, str) else capsys.readouterr().err
                assert flag in said, said
            assert len(said.strip().splitlines()) <= 1 and len(said) < 1000, said
