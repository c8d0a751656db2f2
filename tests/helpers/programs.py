"""Every program of the repository, found by what its file says."""

from __future__ import annotations

from tests.conftest import ROOT

_IS_PROGRAM = 'if __name__ == "__main__":'
_FILES = [*ROOT.glob("main_*.py"), *(ROOT / "scripts").rglob("*.py")]
_CLI = [path.with_name("cli.py") for path in (ROOT / "scripts").rglob("__main__.py")]  # what a package starts

PROGRAMS = sorted(
    path.relative_to(ROOT).as_posix().removesuffix(".py").replace("/", ".")
    for path in [*_CLI, *(path for path in _FILES if _IS_PROGRAM in path.read_text(encoding="utf-8"))]
)
"""Module names."""
