"""One process alone, two gloo processes under torchrun's environment, and devices that are not there."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT
from util import distributed
from util.distributed import DistInfo, any_rank, barrier, init_distributed, is_main, reduce_mean, shutdown

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
