"""One process alone, two gloo processes under torchrun's environment, and devices that are not there."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.helpers.runs import FORK
from util import distributed
from util.distributed import (
    DistInfo,
    any_rank,
    barrier,
    failing_together,
    init_distributed,
    is_main,
    reduce_mean,
    shutdown,
)
from util.failures import one_line_errors

WORKER = """
import json, torch
from util.distributed import any_rank, barrier, init_distributed, is_main, reduce_mean, shutdown
info = init_distributed("cpu")
own = torch.tensor([1.0, 10.0]) * (info.rank + 1)
mean = reduce_mean(own)
barrier()
print(json.dumps({
    "rank": info.rank, "world_size": info.world_size, "local_rank": info.local_rank, "device": str(info.device),
    "is_main": [info.is_main, is_main()], "own": own.tolist(), "mean": mean.tolist(),
    "named": reduce_mean({"z": float(info.rank), "a": 4.0}),
    "any": [any_rank(info.rank == 1), any_rank(False)],
}))
shutdown()
"""


@pytest.fixture(autouse=True)
def _not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_a_single_process_needs_no_group() -> None:
    info = init_distributed("cpu")
    assert info == DistInfo(0, 1, 0, torch.device("cpu")) and info.is_main and is_main()
    assert not torch.distributed.is_initialized()
    values = torch.tensor([1.0])
    assert torch.equal(reduce_mean(values), values) and reduce_mean(values) is not values
    assert reduce_mean({"b": 1, "a": 2.5}) == {"b": 1.0, "a": 2.5}
    assert any_rank(True) is True and any_rank(False) is False
    barrier()
    shutdown()


def test_two_processes() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER],
            cwd=ROOT,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    answers = [json.loads(worker.communicate(timeout=120)[0]) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    for rank, answer in enumerate(answers):
        assert (answer["rank"], answer["world_size"], answer["local_rank"], answer["device"]) == (rank, 2, rank, "cpu")
        assert answer["is_main"] == [rank == 0] * 2
        assert answer["own"] == [1.0 * (rank + 1), 10.0 * (rank + 1)]  # left as it was
        assert answer["mean"] == [1.5, 15.0]
        assert answer["named"] == {"z": 0.5, "a": 4.0}
        assert answer["any"] == [True, False]


def test_incomplete_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="RANK, WORLD_SIZE set, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not"):
        init_distributed("cpu")


def test_missing_cuda_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="run with --device cpu"):
        init_distributed("cuda")


@pytest.mark.parametrize("name", ["gpu", "mps", "meta", ""])
def test_unknown_devices(name: str) -> None:
    with pytest.raises(ValueError, match="choose cpu or cuda"):
        init_distributed(name)


def test_cuda_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    choose = distributed._choose_device
    assert choose("cuda", None) == torch.device("cuda", 0) and choose("cuda:1", None) == torch.device("cuda", 1)
    assert choose("cuda", 1) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="GPU 2 was asked for, this machine has 2"):
        choose("cuda", 2)
    with pytest.raises(ValueError, match="use --device cuda"):
        choose("cuda:0", 0)


# --- failures of several processes -----------------------------------------------------------------------------------


def fails(kind: str, rank: int) -> None:
    """What a program does whose ranks fail in this way."""
    if kind == "before they meet":
        raise FileNotFoundError(2, "No such file or directory", "x.json")
    init_distributed("cpu", timeout_s=2)
    if kind == "alike":
        raise ValueError("no such thing")
    if kind == "one alone" and rank == 1:
        raise ValueError("only here")
    if kind == "each its own":
        raise ValueError(f"mine is {rank}")
    with failing_together():
        if kind == "together" and rank == 1:
            raise FileNotFoundError(2, "No such file or directory", "x.jpg")
    if kind == "one hangs" and rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "one is killed" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    barrier()
    shutdown()


def a_rank(kind: str, rank: int, port: int, stderr: Path) -> None:
    """A program in a forked process, as torchrun starts it."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    status = 0
    with open(stderr, "w") as sys.stderr:
        os.dup2(sys.stderr.fileno(), 2)
        try:
            with one_line_errors("prog"):
                fails(kind, rank)
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:  # noqa: BLE001 - a traceback is what the test looks for
            traceback.print_exc()
            status = 99
    os._exit(status)


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        ("none", []),
        ("before they meet", ["prog: error: x.json: No such file or directory"]),
        ("alike", ["prog: error: no such thing"]),
        ("one alone", ["[rank 1] prog: error: only here"]),
        ("each its own", ["[rank 1] prog: error: mine is 1", "prog: error: mine is 0"]),
        ("together", ["prog: error: rank 1: x.jpg: No such file or directory"]),
        ("one hangs", ["prog: error: no answer from rank 1: ended or hanging (rank 0 waited)"]),
        ("one is killed", ["prog: error: no answer from rank 1: ended or hanging (rank 0 waited)"]),
    ],
)
def test_a_failure_of_two_processes_is_told_once(kind: str, lines: list[str], tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [FORK.Process(target=a_rank, args=(kind, rank, port, tmp_path / f"{rank}")) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    ranks[0].join(60)
    if kind == "one hangs":
        ranks[1].kill()
    ranks[1].join(60)
    said = "".join((tmp_path / f"{rank}").read_text() for rank in (0, 1))
    assert ranks[0].exitcode == (0 if kind == "none" else 1)
    assert sorted(line for line in said.splitlines() if "prog" in line) == sorted(lines)
    assert "Traceback" not in said
