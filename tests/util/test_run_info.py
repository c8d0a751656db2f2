"""The note about where a run ran."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path

import pytest
import torch

from util import run_info
from util.run_info import describe_environment


def test_contents_are_plain_and_complete() -> None:
    note = describe_environment()
    assert json.loads(json.dumps(note)) == note
    assert note["torch"] == torch.__version__ and note["python"].startswith("3.")
    assert note["packages"]["numpy"] and note["packages"]["PyYAML"] and len(note["packages"]) > 10
    assert all(note["packages"].values())
    assert note["threads"]["torch"] == torch.get_num_threads() and note["threads"]["cpus"] >= 1
    assert "pytest" in note["command"] and note["device"]
    host = socket.gethostname()
    assert len(host) < 4 or host not in json.dumps({**note, "command": ""})


def test_git_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_info, "_ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    note = describe_environment()
    assert note["git_commit"] is None and note["git_dirty"] is None and note["packages"] == {}

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "a")
    note = describe_environment()
    assert len(note["git_commit"]) == 40 and note["git_dirty"] is False
    (tmp_path / "a").write_text("2")
    assert describe_environment()["git_dirty"] is True


def test_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert describe_environment()["git_commit"] is None
