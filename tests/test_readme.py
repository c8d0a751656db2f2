"""The README's commands parse, its files exist, its table of flags is the parser's."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from collections.abc import Sequence
from typing import Any

import pytest

from engine.arguments import train_parser
from engine.validate import RULES
from tests.conftest import ROOT
from tests.test_main_mar import STAGE_1, STAGE_2, words

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
    """Calls a program's `main` up to where its parser is done. Returns what was parsed."""
    original = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        raise Parsed(original(self, args, namespace))

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
    values = parse(f"main_{found[4]}", shlex.split(command[found.end() :]))
    for name, (holds, message) in RULES.items():
        assert values.get(name) is None or holds(values[name]), f"--{name} {message}"


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
    missing = {name for name in modules if not (ROOT / (name.replace(".", "/") + ".py")).is_file()}
    assert missing | {path for path in paths if not (ROOT / path).exists()} == set()


def test_links_inside_the_repository_lead_somewhere() -> None:
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    assert targets
    assert [target for target in targets if not (ROOT / target.split("#")[0]).exists()] == []


@pytest.mark.parametrize("paper", [STAGE_1, STAGE_2], ids=["stage1", "stage2"])
def test_the_papers_commands_are_there_unchanged(paper: str) -> None:
    assert paper.strip() in README
    assert shlex.join(["python", "main_mar.py", *words(paper)]) in MAINS


def test_what_is_not_there_yet_is_said_to_be_missing() -> None:
    if (ROOT / "main_rl.py").exists():
        assert any("main_rl.py" in command for command in MAINS)
    else:
        assert re.search(r"`main_rl\.py`\)? is not in this version", README)


def flag_table() -> dict[str, str]:
    """Flag -> its row (flag, default, meaning), of the section on the flags of main_mar.py."""
    section = README.split("## Flags of main_mar.py", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return {flag: row for row in rows for flag in re.findall(r"--\w+", row.split("|")[1])}


def test_the_table_has_every_flag_and_no_other() -> None:
    flags = {
        option
        for action in train_parser()._actions
        for option in action.option_strings
        if option.startswith("--") and option not in ("--help", f"--no_{action.dest}", f"--no-{action.dest}")
    }
    assert {flag for flag in flag_table() if not flag.startswith("--no-")} == flags


def test_the_table_has_the_defaults() -> None:
    stated = {flag: row.split("|")[2].strip() for flag, row in flag_table().items()}
    defaults = {f"--{action.dest}": action.default for action in train_parser()._actions if action.dest != "help"}
    assert stated == {flag: "" if value is None else str(value) for flag, value in defaults.items()}


def test_nothing_was_left_to_fill_in() -> None:
    assert re.findall(r"@@\w*@@|TODO|TBD", README) == []
