"""Medians of interleaved runs, and how fast the machine is at the two things that bound everything: matmul and copy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

Name = TypeVar("Name")
MATMUL_SIZES = (1024, 2048)
COPY_BYTES = 256 * 2**20
CEILING_REPEATS = 5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Times:
    """Seconds of every counted run of one contender, in the order they were taken."""

    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    @property
    def fastest(self) -> float:
        return min(self.runs)


def interleave(contenders: Mapping[Name, Callable[[], object]], repeats: int) -> dict[Name, Times]:
    """Runs A B C A B C ..., `repeats` times, so that a busy machine slows all alike. Warming up is the caller's."""
    seconds: dict[Name, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: Times(tuple(runs)) for name, runs in seconds.items()}


@dataclass(frozen=True)
class Ceilings:
    """matmul: FLOP/s of the best square product by precision. copy: bytes/s, read and written, of a large tensor."""

    matmul: dict[str, float]
    copy: float


def measure_ceilings() -> Ceilings:
    """With the number of threads that is set. The best of several runs: a ceiling is not an average."""
    matmul = {name: max(_matmul_rate(size, dtype) for size in MATMUL_SIZES) for name, dtype in DTYPES.items()}
    source = torch.zeros(COPY_BYTES // 4)
    target = torch.ones_like(source)
    return Ceilings(matmul, 2 * COPY_BYTES / _fastest(lambda: target.copy_(source)))


def _matmul_rate(size: int, dtype: torch.dtype) -> float:
    left, right = (torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(dtype) for _ in range(2))
    return 2 * size**3 / _fastest(lambda: left @ right)


def _fastest(run: Callable[[], object]) -> float:
    run()
    return interleave({"": run}, CEILING_REPEATS)[""].fastest
