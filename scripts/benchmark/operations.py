"""Kernels and host syncs of the sampling loop: of one head step, and of one iteration; counted, not timed.

A head step's are the difference between two runs that differ in reverse steps alone, per step; an iteration's
the difference between two runs that differ by one iteration (of FEW reverse steps). So what happens once per image, or
once for several reverse steps, is in neither or in there by its share.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from types import ModuleType
from typing import Any

from models.masking import cosine_masked_counts
from scripts.benchmark.counting import Counts, count
from scripts.benchmark.sampling import FULL, OWN, PUBLIC_TOO, Entry, SamplingCase
from scripts.benchmark.world import STRUCTURED, World, build_world, is_structured, random_model

HEAD_BLOCKS = 12  # mar_huge's; widths do not matter, so the models are small
MODELS: dict[str, dict[str, Any]] = {"MAR": {"rope_mode": "off"}, "StructMAR": STRUCTURED}
FEW, MANY = 10, 20
ITERATIONS = (0, 10)


@dataclass(frozen=True)
class LoopOperations:
    """See the module's docstring. syncs: host syncs (`scripts/benchmark/counting.py`)."""

    model: str
    who: str
    kernels_per_head_step: float
    syncs_per_head_step: float
    kernels_per_iteration: int
    syncs_per_iteration: int


def all_operations(public: ModuleType | None) -> list[LoopOperations]:
    """public: the module of `load_baseline`; None leaves its rows out."""
    found: list[LoopOperations] = []
    for name, options in MODELS.items():
        world = build_world(random_model("mar_mini", diffloss_d=HEAD_BLOCKS, **options), 1)
        found += count_operations(f"{name}, {HEAD_BLOCKS} head blocks", world, public)
    return found


def count_operations(name: str, world: World, public: ModuleType | None) -> list[LoopOperations]:
    """With guidance by one scale, that is two branches, in float32."""
    entries = tuple(entry for entry in (OWN if is_structured(world.model) else PUBLIC_TOO) if entry.precision == "fp32")
    short, long, single = (
        _counts(world, public, entries, steps, iterations)
        for steps, iterations in ((FEW, ITERATIONS), (MANY, ITERATIONS), (FEW, ITERATIONS[:1]))
    )
    head_steps = len(ITERATIONS) * (MANY - FEW)
    return [
        LoopOperations(
            name,
            who,
            (long[who].kernels - short[who].kernels) / head_steps,
            (long[who].syncs - short[who].syncs) / head_steps,
            short[who].kernels - single[who].kernels,
            short[who].syncs - single[who].syncs,
        )
        for who in short
    ]


def _counts(
    world: World, public: ModuleType | None, entries: tuple[Entry, ...], steps: int, iterations: tuple[int, ...]
) -> dict[str, Counts]:
    sampling = replace(FULL, num_iter=16, num_sampling_steps=steps)
    case = SamplingCase("", "", len(world), sampling, entries, iterations)
    return {each.who: count(each.run)[1] for each in case.contenders(world, public)}


def head_shapes(num_tokens: int, num_iter: int) -> int:
    """Different numbers of tokens per image that the head sees in a schedule: what would be compiled or captured."""
    counts = cosine_masked_counts(num_tokens, num_iter)
    return len({now - after for now, after in pairwise(counts)})


HEADER = ("kernels and syncs", "who", "kernels a head step", "syncs a head step", "kernels an iteration", "syncs")


def cells(row: LoopOperations) -> list[str]:
    steps, iterations = (row.kernels_per_head_step, row.syncs_per_head_step), row.kernels_per_iteration
    return [row.model, row.who, *(f"{value:.1f}" for value in steps), str(iterations), str(row.syncs_per_iteration)]
