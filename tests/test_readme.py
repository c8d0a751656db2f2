"""The README's commands parse, its files exist, its table of flags is the parser's."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from collections.abc import Sequence
from typing import Any

import pytest

from engine.cli.arguments import train_parser
from engine.cli.arguments_rl import rl_parser
from tests.conftest import ROOT
from tests.test_main_mar import STAGE_1, STAGE_2, words
from tests.test_main_rl import STAGE_3
from util.ranges import check_ranges

README = (ROOT / "README.md").read_text(encoding="utf-8")
LAUNCHER = re.compile(r"(torchrun( --\w+ \d+)*|(\.venv/bin/)?python) main_(\w+)\.py ")
SCRIPT = re.compile(r"(\.venv/bin/)?python -m (scripts[.\w]+)")


def bash_commands(text: str) -> list[str]:
    """The commands of all ```bash blocks, each in one line, without comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.join(shlex.split(line, comments=True)) for line in lines]
    return [command for command in commands if command]


COMMANDS = bash_commands(README)
MAINS = [command for command in COMMANDS if LAUNCHER.match(command)]
SCRIPTS = [command for command in COMMANDS if SCRIPT.match(command)]
SHELL = [command for command in COMMANDS if command.startswith("bash ")]


class Parsed(Exception):
    """Ends a program once its command line was parsed."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.values = vars(args)


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch):
    """Calls a program's `main` up to where its parser is done. Returns what was parsed; numbers lie in their ranges."""
    original = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        parsed = original(self, args, namespace)
        check_ranges(self._actions, vars(parsed))
        raise Parsed(parsed)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.chdir(ROOT)

    def run(module: str, argv: Sequence[str]) -> dict[str, Any]:
        monkeypatch.setattr("sys.argv", [module, *argv])
        with pytest.raises(Parsed) as caught:
            importlib.import_module(module).main()
        return caught.value.values

    return run


def test_every_command_is_one_that_is_checked() -> None:
    assert len(MAINS) >= 2 and len(SCRIPTS) >= 2 and len(SHELL) >= 2
    assert [command for command in COMMANDS if command not in (*MAINS, *SCRIPTS, *SHELL)] == []


@pytest.mark.parametrize("command", MAINS, ids=range(len(MAINS)))
def test_main_commands_parse(parse, command: str) -> None:
    found = LAUNCHER.match(command)
    assert found
    parse(f"main_{found[4]}", shlex.split(command[found.end() :]))


@pytest.mark.parametrize("command", SCRIPTS, ids=range(len(SCRIPTS)))
def test_script_commands_parse(parse, command: str) -> None:
    found = SCRIPT.match(command)
    assert found
    parse(found[2], shlex.split(command[found.end() :]))


def test_a_mistyped_flag_would_be_found(parse) -> None:
    """The two tests above can fail: the parsers take no unknown flags and no unknown values."""
    for module, argv in (("main_mar", ["--batchsize", "3"]), ("scripts.sample", ["--precision", "fp8"])):
        with pytest.raises(SystemExit) as caught:
            parse(module, argv)
        assert caught.value.code == 2


@pytest.mark.parametrize("command", SHELL, ids=range(len(SHELL)))
def test_shell_scripts_exist_and_know_their_arguments(command: str) -> None:
    _, script, *arguments = shlex.split(command)
    text = (ROOT / script).read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash")
    assert [argument for argument in arguments if argument.startswith("--") and argument not in text] == []


def test_scripts_and_modules_in_the_text_exist() -> None:
    modules = set(re.findall(r"\b(scripts(?:\.\w+)+)\b", README))
    paths = set(re.findall(r"\b((?:configs|models|engine|util|scripts|tests)/[\w/.-]*\w)", README))
    assert len(modules) >= 4 and len(paths) >= 8
    places = {name: ROOT / name.replace(".", "/") for name in modules}
    programs = {name for name, place in places.items() if (place / "__main__.py").is_file()}  # packages
    missing = {name for name, place in places.items() if not place.with_suffix(".py").is_file()} - programs
    assert missing | {path for path in paths if not (ROOT / path).exists()} == set()


def test_links_inside_the_repository_lead_somewhere() -> None:
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    assert targets
    assert [target for target in targets if not (ROOT / target.split("#")[0]).exists()] == []  # "#heading": ROOT itself


@pytest.mark.parametrize("paper", [STAGE_1, STAGE_2, STAGE_3], ids=["stage1", "stage2", "stage3"])
def test_the_papers_commands_are_there_unchanged(paper: str) -> None:
    assert paper.strip() in README
    assert shlex.join([*shlex.split(paper)[:2], *words(paper)]) in MAINS


def test_every_anchor_is_a_heading() -> None:
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors


def flag_table(program: str) -> dict[str, str]:
    """Flag -> its row (flag, default, meaning), of the section on the program's flags."""
    section = README.split(f"## Flags of {program}", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return {flag: row for row in rows for flag in re.findall(r"^\| `(--\w+)`", row)}


def facts(parser: argparse.ArgumentParser) -> dict[str, tuple[str, str]]:
    """Flag -> its default and meaning as the table states them."""
    stated = {}
    for action in parser._actions:
        choices = f" ({', '.join(map(str, action.choices))})" if action.choices else ""
        default = "" if action.default in (None, "") else str(action.default)
        stated[f"--{action.dest}"] = (default, f"{action.help}{choices}")
    del stated["--help"]
    return stated


def cells(row: str) -> tuple[str, str]:
    _, _, default, meaning, _ = row.split("|")
    return default.strip(), meaning.strip()


def test_the_table_of_stages_1_and_2_is_the_parsers() -> None:
    assert {flag: cells(row) for flag, row in flag_table("main_mar.py").items()} == facts(train_parser())


def test_the_table_of_stage_3_has_what_differs() -> None:
    first, third = facts(train_parser()), facts(rl_parser())
    differing = {flag: fact for flag, fact in third.items() if first.get(flag) != fact}
    assert {flag: cells(row) for flag, row in flag_table("main_rl.py").items()} == differing
    absent = README.split("## Flags of main_rl.py", 1)[1].split("and with these", 1)[0]
    assert set(re.findall(r"--\w+", absent)) == first.keys() - third.keys()


def test_nothing_was_left_to_fill_in() -> None:
    assert re.findall(r"@@\w*@@|TODO|TBD", README) == []
