"""The example for SLURM: its command is the parser's, SIGTERM reaches the run, only a stopped job is queued again."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.cli.arguments import train_parser
from tests.conftest import ROOT
from util.config import parse_args

SCRIPT = ROOT / "scripts" / "slurm.sbatch"

SCONTROL = """#!/bin/bash
echo "$*" >> scontrol.log
if [ "$1 $2" = "show hostnames" ]; then echo node1; echo node2; fi
"""
SRUN = """#!/bin/bash
printf '%s\\n' "$@" > srun.log
trap 'sleep 0.2; touch saved; exit 1' TERM
touch started
{then}
"""


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two nodes, whose programs are in `tmp_path`."""
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    slurm = {"SUBMIT_DIR": str(tmp_path), "JOB_NODELIST": "node[1-2]", "JOB_NUM_NODES": "2", "GPUS_ON_NODE": "8"}
    own = {f"SLURM_{name}": value for name, value in {**slurm, "JOB_ID": "123456"}.items()}
    return {**os.environ, **own, "PATH": f"{tmp_path}:{os.environ['PATH']}"}


def write_srun(folder: Path, then: str) -> None:
    (folder / "srun").write_text(SRUN.replace("{then}", then))
    (folder / "srun").chmod(0o755)


def test_it_is_bash_and_its_command_parses(
    tmp_path: Path, job: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    write_srun(tmp_path, "exit 0")
    subprocess.run(["bash", SCRIPT], env=job, check=True)
    words = (tmp_path / "srun.log").read_text().splitlines()
    at = words.index("main_mar.py")
    monkeypatch.chdir(ROOT)
    args = parse_args(train_parser(), words[at + 1 :])
    launcher = dict(zip(words[2:at:2], words[3:at:2], strict=True))
    assert words[1] == ".venv/bin/torchrun"
    assert (launcher["--nnodes"], launcher["--nproc_per_node"]) == ("2", "8")
    assert launcher["--rdzv_endpoint"] == "node1:23456"
    assert args.train_mode == "full" and args.fsdp
    paper = parse_args(train_parser(), ["--config", "configs/stage2_sft.yaml"])
    assert args.batch_size * args.accum_iter * 16 == paper.batch_size
    torchrun = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--help"], capture_output=True, text=True, check=True
    )
    assert all(flag in torchrun.stdout for flag in launcher)


def test_a_stopped_job_is_queued_again(tmp_path: Path, job: dict[str, str]) -> None:
    write_srun(tmp_path, "while true; do sleep 0.05; done")
    process = subprocess.Popen(["bash", SCRIPT], env=job)
    deadline = time.monotonic() + 30
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    assert (tmp_path / "saved").exists()  # it was waited for
    assert (tmp_path / "scontrol.log").read_text().splitlines()[-1] == "requeue 123456"


@pytest.mark.parametrize("status", [0, 1, 7])
def test_another_end_is_not(tmp_path: Path, job: dict[str, str], status: int) -> None:
    write_srun(tmp_path, f"exit {status}")
    assert subprocess.run(["bash", SCRIPT], env=job, check=False).returncode == status
    assert "requeue" not in (tmp_path / "scontrol.log").read_text()


def test_slurm_is_told_what_the_script_relies_on() -> None:
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in SCRIPT.read_text().splitlines()
        if line.startswith("#SBATCH")
    )
    assert {"requeue", "signal", "nodes", "gpus-per-node"} <= set(options)
    assert options["signal"].startswith("B:TERM@") and int(options["signal"].partition("@")[2]) > 240
    assert shlex.split(options["ntasks-per-node"]) == ["1"]
