"""Two gloo processes on the CPU, and how their results are compared."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

FORK = multiprocessing.get_context("fork")


def in_two_processes(target: Callable[[int], Any], join_group: bool = True) -> list[Any]:
    """Runs `target(rank)` in two forked processes as torchrun would start them; returns both results."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = FORK.Queue()
    children = [FORK.Process(target=_child, args=(rank, port, target, join_group, results)) for rank in range(2)]
    for child in children:
        child.start()
    collected = dict(results.get(timeout=120) for _ in children)
    for child in children:
        child.join(30)
    for rank in range(2):
        assert not isinstance(collected[rank], str), collected[rank]
    return [collected[0], collected[1]]


def _child(rank: int, port: int, target: Callable[[int], Any], join_group: bool, results: Any) -> None:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    try:
        if join_group:
            dist.init_process_group("gloo")
        results.put((rank, _as_numpy(target(rank))))
        if join_group:
            dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - the parent shows it
        results.put((rank, traceback.format_exc()))
    results.close()
    results.join_thread()
    os._exit(0)


def _as_numpy(value: Any) -> Any:
    """Tensors would travel through shared memory, which ends with the child."""
    if isinstance(value, dict):
        return {key: _as_numpy(entry) for key, entry in value.items()}
    return value.detach().numpy().copy() if isinstance(value, torch.Tensor) else value


def assert_close(found: dict[str, Any], expected: dict[str, torch.Tensor], rtol: float = 1e-3) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if rtol > 1e-3 and name.endswith("kv.bias"):  # key biases have no effect: AdamW steps along rounding errors
            continue
        torch.testing.assert_close(torch.as_tensor(found[name]), tensor.detach(), rtol=rtol, atol=2e-6, msg=name)
