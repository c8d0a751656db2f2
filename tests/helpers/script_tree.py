"""A script of scripts/mini in a copy of the folders it needs, with a python that only writes down what it is asked."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.conftest import ROOT

NOTE_CALL = """#!/bin/bash
echo "$*" >> "$LOG"
words=("$@")
for index in "${!words[@]}"; do
    if [ "${words[$index]}" = --output_dir ]; then folder="${words[$((index + 1))]}"; fi
    if [ "${words[$index]}" = --output ]; then file="${words[$((index + 1))]}"; fi
done
"""


class ScriptTree:
    """script: its file name. root_variable: the environment variable that says where it writes. fake_python: bash text
    that stands in for python, after the call was written down; $folder and $file are its --output_dir and --output."""

    def __init__(self, root: Path, script: str, root_variable: str, fake_python: str) -> None:
        self.root, self.log = root, root / "log"
        self.script, self.root_variable = root / "scripts/mini" / script, root_variable
        self.script.parent.mkdir(parents=True)
        for name in (script, "precision.sh"):
            shutil.copy(ROOT / "scripts/mini" / name, self.script.parent / name)
        (root / "scripts/setup_env.sh").write_text("")
        python = root / ".venv/bin/python"
        python.parent.mkdir(parents=True)
        python.write_text(NOTE_CALL + fake_python)
        python.chmod(0o755)

    def run(self, *arguments: str, **env: str) -> tuple[int, list[str]]:
        """The exit code, and what was asked of python this time."""
        self.log.write_text("")
        values = {"PATH": os.environ["PATH"], "LOG": str(self.log), self.root_variable: str(self.root)} | env
        finished = subprocess.run(["bash", str(self.script), *arguments], env=values, capture_output=True, check=False)
        return finished.returncode, self.log.read_text().splitlines()
