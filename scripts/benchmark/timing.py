"""Medians of interleaved runs, and how fast the machine is at the two things that bound everything: matmul and copy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from models.heads.packed import PackedLinear, can_pack

Name = TypeVar("Name")
MATMUL_SHAPES = ((64, 1024), (256, 1024), (1024, 1024), (2048, 2048))  # rows and width of a square linear
COPY_BYTES = 256 * 2**20
CEILING_REPEATS, CEILING_SECONDS = 5, 0.2
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
    """matmul: FLOP/s of the best product by precision. copy: bytes/s, read and written, of a large tensor."""

    matmul: dict[str, float]
    copy: float

    def best_of(self, other: Ceilings) -> Ceilings:
        """The higher ceilings: whatever else the machine does can only lower a measured one."""
        matmul = {name: max(rate, other.matmul[name]) for name, rate in self.matmul.items()}
        return Ceilings(matmul, max(self.copy, other.copy))


@torch.no_grad()
def measure_ceilings() -> Ceilings:
    """With the number of threads that is set. The best of many runs, the first of which warm up: a ceiling is not an
    average."""
    matmul = {name: max(_matmul_rate(*shape, dtype) for shape in MATMUL_SHAPES) for name, dtype in DTYPES.items()}
    source = torch.zeros(COPY_BYTES // 4)
    target = torch.ones_like(source)
    return Ceilings(matmul, 2 * COPY_BYTES / _fastest(lambda: target.copy_(source)))


def _matmul_rate(rows: int, width: int, dtype: torch.dtype) -> float:
    """Of the faster one of what the code uses: PyTorch's linear, and ours on packed weights where there is one."""
    linear = nn.Linear(width, width).to(dtype)
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(dtype)  # [r, W]
    products: list[nn.Module] = [linear]
    if can_pack(width, dtype, x.device):
        products.append(PackedLinear(linear, with_silu=False))
    return 2 * rows * width**2 / min(_fastest(partial(product, x)) for product in products)


def _fastest(run: Callable[[], object]) -> float:
    """Seconds of the fastest of the runs that fit into `CEILING_SECONDS`, at least `CEILING_REPEATS`."""
    end, seconds = time.perf_counter() + CEILING_SECONDS, list[float]()
    while len(seconds) < CEILING_REPEATS or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
