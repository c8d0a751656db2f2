"""Every page of text: its commands parse, its paths and links exist, its tables of flags are the parsers'.

`python -m tests.test_readme` prints the tables of flags for configs/README.md.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from engine.cli.arguments import train_parser
from engine.cli.arguments_rl import rl_parser
from tests.conftest import ROOT
from tests.helpers.paper_commands import STAGE_1, STAGE_2, STAGE_3, words
from util.ranges import check_ranges

ROOMS = (
    "configs",
    "engine/data",
    "engine/eval",
    "engine/plan",
    "engine/page",
    "engine/rl",
    "engine/sample",
    "engine/train",
    "models/mars",
    "models/sampling",
)
ROOMS += ("scripts/benchmark", "scripts/mini")
PAGES = ("README.md", ".github/CONTRIBUTING.md", *(f"{room}/README.md" for room in ROOMS))
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
README, FLAGS = TEXTS["README.md"], TEXTS["configs/README.md"]
MAX_BYTES = 10_000  # of README.md
LAUNCHER = re.compile(r"(torchrun( --\w+ \d+)*|(\.venv/bin/)?python) main_(\w+)\.py ")
SCRIPT = re.compile(r"(\.venv/bin/)?python -m (scripts[.\w]+)")


def bash_commands(text: str) -> list[str]:
    """The commands of all ```bash blocks, each in one line, without comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.join(shlex.split(line, comments=True)) for line in lines]
    return [command for command in commands if command]


def inline_commands(text: str) -> list[str]:
    """Whole commands inside sentences."""
    found = re.findall(r"(?<!`)`((?:python main_|python -m scripts|bash )[^`]+)`", text)
    return [shlex.join(shlex.split(command)) for command in found if "..." not in command]


COMMANDS = {
    f"{page}-{number}": command
    for page, text in TEXTS.items()
    for number, command in enumerate([*bash_commands(text), *inline_commands(text)])
}
MAINS = {key: command for key, command in COMMANDS.items() if LAUNCHER.match(command)}
SCRIPTS = {key: command for key, command in COMMANDS.items() if SCRIPT.match(command)}
SHELL = {key: command for key, command in COMMANDS.items() if command.startswith("bash ")}


class Parsed(BaseException):
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


def test_no_page_is_forgotten() -> None:
    top = ("configs", "engine", "models", "scripts", "tests", "util")
    found = {path.relative_to(ROOT).as_posix() for name in top for path in (ROOT / name).rglob("*.md")}
    assert found == set(PAGES) - {"README.md", ".github/CONTRIBUTING.md"}


def test_the_readme_is_short() -> None:
    assert len(README.encode()) <= MAX_BYTES


def test_every_command_is_one_that_is_checked() -> None:
    assert len(MAINS) >= 4 and len(SCRIPTS) >= 10 and len(SHELL) >= 4
    assert COMMANDS.keys() - MAINS.keys() - SCRIPTS.keys() - SHELL.keys() == set()


@pytest.mark.parametrize("command", MAINS.values(), ids=MAINS)
def test_main_commands_parse(parse, command: str) -> None:
    found = LAUNCHER.match(command)
    assert found
    parse(f"main_{found[4]}", shlex.split(command[found.end() :]))


@pytest.mark.parametrize("command", SCRIPTS.values(), ids=SCRIPTS)
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


@pytest.mark.parametrize("command", SHELL.values(), ids=SHELL)
def test_shell_scripts_exist_and_know_their_arguments(command: str) -> None:
    _, script, *arguments = shlex.split(command)
    text = (ROOT / script).read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash")
    assert [argument for argument in arguments if argument.startswith("--") and argument not in text] == []


@pytest.mark.parametrize("page", PAGES)
def test_scripts_and_modules_in_the_text_exist(page: str) -> None:
    modules = set(re.findall(r"\b(scripts(?:\.\w+)+)\b", TEXTS[page]))
    paths = set(re.findall(r"\b((?:configs|models|engine|util|scripts|tests)/[\w/.-]*\w)", TEXTS[page]))
    assert modules | paths
    places = {name: ROOT / name.replace(".", "/") for name in modules}
    programs = {name for name, place in places.items() if (place / "__main__.py").is_file()}  # packages
    missing = {name for name, place in places.items() if not place.with_suffix(".py").is_file()} - programs
    assert missing | {path for path in paths if not (ROOT / path).exists()} == set()


def headings(page: Path) -> set[str]:
    """The anchors of a page."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES)
def test_links_inside_the_repository_lead_somewhere(page: str) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)]+)\)", TEXTS[page]):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        if not target.exists() or (anchor and anchor not in headings(target)):
            broken.append(link)
    assert broken == []


def test_the_readme_leads_to_every_page() -> None:
    links = {link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", README)}
    assert links >= set(PAGES) - {"README.md"}


@pytest.mark.parametrize("paper", [STAGE_1, STAGE_2, STAGE_3], ids=["stage1", "stage2", "stage3"])
def test_the_papers_commands_are_there_unchanged(paper: str) -> None:
    assert paper.strip() in README
    assert shlex.join([*shlex.split(paper)[:2], *words(paper)]) in MAINS.values()


def facts(action: argparse.Action) -> tuple[str, str]:
    """Default and meaning of a flag as the table states them."""
    choices = f" ({', '.join(map(str, action.choices))})" if action.choices else ""
    default = "" if action.default in (None, "") else str(action.default)
    return default, f"{action.help}{choices}"


def flags(parser: argparse.ArgumentParser) -> dict[str, tuple[str, str]]:
    return {action.option_strings[0]: facts(action) for action in parser._actions if action.dest != "help"}


def flag_table(parser: argparse.ArgumentParser, known: Mapping[str, tuple[str, str]]) -> list[str]:
    """The lines of the Markdown table of a parser's flags, group by group, without those that are `known`."""
    lines = ["| flag | default | meaning |", "|---|---|---|"]
    for group in parser._action_groups:
        rows = {action.option_strings[0]: facts(action) for action in group._group_actions if action.dest != "help"}
        rows = {flag: fact for flag, fact in rows.items() if known.get(flag) != fact}
        if rows:
            lines.append(f"| **{group.title}** | | |")
            lines += [f"| `{flag}` | {default} | {meaning} |" for flag, (default, meaning) in rows.items()]
    return lines


def section(program: str) -> str:
    return FLAGS.split(f"## Flags of {program}", 1)[1].split("\n## ", 1)[0]


def test_the_table_of_stages_1_and_2_is_the_parsers() -> None:
    table = [line for line in section("main_mar.py").splitlines() if line.startswith("|")]
    assert table == flag_table(train_parser(), {})


def test_the_table_of_stage_3_has_what_differs() -> None:
    first, third = flags(train_parser()), flags(rl_parser())
    table = [line for line in section("main_rl.py").splitlines() if line.startswith("|")]
    assert table == flag_table(rl_parser(), first)
    absent = section("main_rl.py").split("and with these", 1)[0]
    assert set(re.findall(r"--\w+", absent)) == first.keys() - third.keys()


@pytest.mark.integration
def test_the_lines_of_python_make_the_commands_image(tmp_path: Path) -> None:
    """Both as a reader runs them in the repository's root, here a folder of links to it."""
    for name in ("configs", "engine", "models", "pretrained_models", "scripts", "util"):
        (tmp_path / name).symlink_to(ROOT / name)
    part = README.split("## Ten lines of Python", 1)[1]
    (code,) = re.findall(r"^```python\n(.*?)^```", part, re.MULTILINE | re.DOTALL)
    command = shlex.split(bash_commands(part)[0])
    assert len(code.splitlines()) <= 10 and command[0] == "python"
    for argv in (["-c", code], command[1:]):
        finished = subprocess.run(
            [sys.executable, *argv], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
        )
        assert finished.returncode == 0, finished.stderr[-4000:]
    with Image.open(tmp_path / "output/samples/0000.png") as sampled, Image.open(tmp_path / "beach.png") as drawn:
        assert drawn.tobytes() == sampled.convert(drawn.mode).resize(drawn.size).tobytes()


@pytest.mark.parametrize("page", PAGES)
def test_nothing_was_left_to_fill_in(page: str) -> None:
    assert re.findall(r"@@|TODO|TBD", TEXTS[page]) == []


if __name__ == "__main__":
    for lines in (flag_table(train_parser(), {}), flag_table(rl_parser(), flags(train_parser()))):
        sys.stdout.write("\n".join([*lines, "", ""]))
