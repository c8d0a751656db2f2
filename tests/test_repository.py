"""The commands around the code: pinned requirements, the environment's script, the tests' script."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.helpers.source_files import imported_modules, source_files

PACKAGE_OF = {"cv2": "opencv-python-headless", "PIL": "pillow", "yaml": "PyYAML"}
PROJECT = {"util", "models", "engine", "scripts", "tests", "main_mar", "main_rl"}


def pins() -> dict[str, str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_requirements_are_exact_and_installed() -> None:
    assert all(re.fullmatch(r"\d[\w.]*", version) for version in pins().values())
    assert {name: metadata.version(name).split("+")[0] for name in pins()} == pins()


def test_every_imported_package_is_required() -> None:
    pinned = {name.lower() for name in pins()}
    files = [*(path for _, path in source_files(ROOT)), *(ROOT / "tests").glob("*.py")]
    missing = set()
    for path in files:
        for line, target in imported_modules(ast.parse(path.read_text(encoding="utf-8")), "tests.x"):
            name = target.split(".")[0]
            is_ours = name in PROJECT or name in sys.stdlib_module_names
            if not is_ours and PACKAGE_OF.get(name, name).lower() not in pinned:
                missing.add(f"{path.name}:{line} {name}")
    assert missing == set()


def tree_with(folder: Path, script: str) -> Path:
    (folder / "scripts").mkdir(exist_ok=True)
    shutil.copy(ROOT / "scripts" / script, folder / "scripts" / script)
    return folder / "scripts" / script


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def run(script: Path, *arguments: str, path: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": path, "HOME": str(script.parent), "PIP_NO_INDEX": "1"}
    command = ["/bin/bash", str(script), *arguments]
    return subprocess.run(command, cwd="/", env=env, capture_output=True, text=True, check=False)


def test_setup_without_python311_says_so(tmp_path: Path) -> None:
    script = tree_with(tmp_path, "setup_env.sh")
    (tmp_path / "requirements.txt").write_text("")
    dirname = shutil.which("dirname")
    assert dirname
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "dirname").symlink_to(dirname)
    for _ in ("absent", "present but broken"):
        result = run(script, path=str(tmp_path / "bin"))
        assert result.returncode == 1 and not (tmp_path / ".venv").exists()
        assert result.stderr.startswith("error: python3.11 was not found (or does not run)")
        executable(tmp_path / "bin" / "python3.11", "echo 'version not installed' >&2; exit 127")


def test_setup_refuses_an_environment_of_another_python(tmp_path: Path) -> None:
    executable(tmp_path / ".venv" / "bin" / "python", "exit 1")
    result = run(tree_with(tmp_path, "setup_env.sh"), path=os.environ["PATH"])
    assert result.returncode == 1 and "another Python than 3.11" in result.stderr


@pytest.mark.integration
def test_setup_installs_when_requirements_change(tmp_path: Path) -> None:
    script = tree_with(tmp_path, "setup_env.sh")
    executable(tmp_path / "bin" / "python3.11", f'exec "{sys.executable}" "$@"')
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    record = tmp_path / ".venv" / "requirements.sha256"
    for content in ("# nothing\n", "# nothing else\n"):
        (tmp_path / "requirements.txt").write_text(content)
        first, again = run(script, path=path), run(script, path=path)
        assert first.returncode == 0 and "installing requirements.txt" in first.stdout, first.stderr
        assert record.read_text().strip() == hashlib.sha256(content.encode()).hexdigest()
        assert (again.returncode, again.stdout) == (0, "")
    before = record.read_text()
    (tmp_path / "requirements.txt").write_text("no-such-package==1.0\n")
    assert run(script, path=path).returncode != 0
    assert record.read_text() == before  # so the next run tries again


@pytest.mark.parametrize("failing", [None, "ruff", "mypy", "python"])
def test_test_script_runs_all_and_fails_if_one_does(tmp_path: Path, failing: str | None) -> None:
    script = tree_with(tmp_path, "test.sh")
    executable(tmp_path / "scripts" / "setup_env.sh", "echo environment")
    (tmp_path / "util").mkdir()
    for tool in ("ruff", "mypy", "python"):
        text = f'echo "{tool} $* threads=$OMP_NUM_THREADS"; '
        executable(tmp_path / ".venv" / "bin" / tool, text + ("exit 1" if tool == failing else "exit 0"))
    result = run(script, path=os.environ["PATH"])
    lines = result.stdout.splitlines()
    assert result.returncode == (1 if failing else 0)
    assert lines[-1] == "python -m pytest -q -m not slow threads=1"  # pytest's own last line ends the output
    assert "ruff check threads=1" in lines and "mypy util scripts threads=1" in lines
    assert run(script, "-m", "slow", path=os.environ["PATH"]).stdout.endswith("pytest -q -m slow threads=1\n")


def test_ci_runs_the_tests_script(tmp_path: Path) -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    executable(tmp_path / "scripts" / "test.sh", 'pwd; echo "tests ran"; exit 3')
    executable(tmp_path / "scripts" / "setup_browser.sh", "exit 1")  # as where there is none to be had
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    result = run(tmp_path / ".ci" / "run", path=os.environ["PATH"])
    assert result.stdout.splitlines() == [str(tmp_path), "tests ran"] and result.returncode == 3
