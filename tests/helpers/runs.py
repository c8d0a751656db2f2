"""Runs of the mains in a process of their own, and how their checkpoints are compared."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable
from typing import Any

import torch

FORK = multiprocessing.get_context("fork")


def assert_same(one: Any, other: Any, where: str = "checkpoint") -> None:
    """Bit for bit."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}[{key}]")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def kill_in_call(owner: Any, name: str, calls: int) -> None:
    """From now on SIGKILL ends this process where it would call a method for the time after `calls` others."""
    original, count = getattr(owner, name), itertools.count()

    def killing(*args: Any, **kwargs: Any) -> Any:
        if next(count) == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, killing)


def in_child(target: Callable[[], Any], timeout: float = 120) -> int:
    """Runs in a forked process; returns its exit code, -N if signal N ended it."""
    child = FORK.Process(target=lambda: os._exit(target() or 0))
    child.start()
    child.join(timeout)
    assert child.exitcode is not None, "the child hangs"
    return child.exitcode
