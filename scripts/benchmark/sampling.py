"""Sampling and rollouts: the public code, our plain path (`tests/helpers/plain_sampler.py`) and ours, same weights.

A case is data. A slice runs some iterations of a schedule, which all contenders choose alike; the tokens of the others
stay zero. A rollout of stage 3 is a case with several images of each prompt, without guidance.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from engine.cli.speed import speed_preset
from engine.sample.generate import sampling_dtype
from models.masking import cosine_masked_counts
from models.sampling.config import SamplingConfig, default_sampling
from models.sampling.controls import NoControls
from models.sampling.guidance import embed_branches
from models.sampling.orders import PlannedOrder
from models.sampling.sampler import SamplingRun, unmask
from scripts.benchmark.baseline import build_baseline, sample_baseline
from scripts.benchmark.table import OURS, PLAIN, PUBLIC, Contender
from scripts.benchmark.world import TRAINED, TRAINED_MAR, World


@dataclass(frozen=True)
class Entry:
    """A contender as data. speed: a preset of `engine/cli/speed.py`; the output is another one then."""

    who: str
    precision: str = "fp32"
    speed: str = "exact"


@dataclass(frozen=True)
class SamplingCase:
    """A `Case`. iterations: those of the schedule that run; None: all."""

    name: str
    model: str
    images: int
    sampling: SamplingConfig
    entries: tuple[Entry, ...]
    iterations: tuple[int, ...] | None = None
    group_size: int = 1

    def contenders(self, world: World, public: ModuleType | None) -> list[Contender]:
        entries = [entry for entry in self.entries if entry.who != PUBLIC or public is not None]
        return [_contender(self, entry, world, public) for entry in entries]


OWN = (Entry(PLAIN), Entry(OURS), Entry(OURS, "bf16"))
PUBLIC_TOO = (Entry(PUBLIC), Entry(PUBLIC, "bf16"), *OWN)
FAST, FASTER = (Entry(f"{OURS}, --speed {speed}", "bf16", speed) for speed in ("fast", "faster"))
FEW = (Entry(PUBLIC), Entry(OURS), Entry(OURS, "bf16"), FAST)
UNGUIDED = SamplingConfig(num_iter=16, num_sampling_steps=25)
GUIDED = replace(UNGUIDED, cfg_text=3.0, cfg_layout=3.0)
FULL = replace(GUIDED, num_iter=64, num_sampling_steps=100)
CODES = default_sampling("discrete", cfg_text=3.0, cfg_layout=3.0)
SLICE = tuple(range(4, 64, 17))  # under --speed fast the first one alone runs every branch (of all 64, one in three)
SLICED = f"{len(SLICE)} of 64 iterations"

SAMPLING_CASES = (
    SamplingCase("MAR mar_mini", TRAINED_MAR, 1, FULL, (*PUBLIC_TOO, FAST, FASTER)),
    SamplingCase("MAR mar_mini", TRAINED_MAR, 4, FULL, (*PUBLIC_TOO, FAST, FASTER)),
    SamplingCase(f"MAR mar_base, {SLICED}", "mar_base MAR", 1, FULL, (*PUBLIC_TOO, FAST), SLICE),
    SamplingCase(f"MAR mar_base, {SLICED}", "mar_base MAR", 4, FULL, FEW, SLICE),
    SamplingCase(f"MAR mar_huge, {SLICED}", "mar_huge MAR", 1, FULL, FEW, SLICE),
    SamplingCase("StructMAR mar_mini", TRAINED, 1, FULL, (*OWN, FAST, FASTER)),
    SamplingCase("StructMAR mar_mini, two scales", TRAINED, 8, replace(GUIDED, cfg_text=1.5), OWN),
    SamplingCase(f"StructMAR mar_base, {SLICED}", "mar_base StructMAR", 1, FULL, (*OWN, FAST), SLICE),
    SamplingCase("StructMAR maskgil_base", "maskgil_base StructMAR", 1, CODES, OWN[1:]),
    SamplingCase("StructMAR maskgil_base", "maskgil_base StructMAR", 4, CODES, OWN[1:]),
)
ROLLOUT_CASES = (
    SamplingCase("MAR mar_mini rollout, 4 x 4", TRAINED_MAR, 16, UNGUIDED, PUBLIC_TOO, group_size=4),
    SamplingCase("StructMAR mar_mini rollout, 4 x 4", TRAINED, 16, UNGUIDED, OWN, group_size=4),
)


def _contender(case: SamplingCase, entry: Entry, world: World, public: ModuleType | None) -> Contender:
    sampling = replace(case.sampling, **sampling_options(entry.speed, case.sampling))
    chosen = tuple(range(sampling.num_iter)) if case.iterations is None else case.iterations
    if entry.who == PUBLIC:
        assert public is not None
        return _public_code(entry, sampling, chosen, world, public)
    plain_unmask = importlib.import_module("tests.helpers.plain_sampler").plain_unmask

    @torch.no_grad()
    def run() -> Tensor:
        model = world.model
        branches, used = embed_branches(model, sampling, len(world), world.text, world.layout, world.labels)
        if entry.who == PLAIN:
            tokens = plain_unmask(model, branches, world.orders, world.noise, used, chosen)  # [B, L, C]
        else:
            generators = [torch.Generator()] * len(world)  # not drawn from: the noise is the world's
            job = SamplingRun(model, branches, used, generators, NoControls(), sampling_dtype(entry.precision))
            counts = used.masked_counts(world.orders.shape[1])
            order = PlannedOrder(world.orders, counts) if used.is_blind else job.own_order(counts)
            tokens = unmask(job, job.start(), order, world.step_noise, iterations=chosen)[0]  # [B, L, C]
        return model.unpatchify(tokens, model.config.grid)  # [B, C, h, w]

    return Contender(entry.who, entry.precision, run)


def sampling_options(speed: str, sampling: SamplingConfig) -> dict[str, Any]:
    return {name: value for name, value in speed_preset(speed, asdict(sampling)).items() if name != "precision"}


def _public_code(
    entry: Entry, sampling: SamplingConfig, chosen: Sequence[int], world: World, public: ModuleType
) -> Contender:
    baseline = build_baseline(public, world.model, sampling.num_sampling_steps)
    counts = cosine_masked_counts(world.orders.shape[1], sampling.num_iter)

    def noise_of(iteration: int) -> Tensor:
        num_tokens = counts[iteration] - counts[iteration + 1]
        return world.noise(iteration, sampling.num_sampling_steps + 1, num_tokens).flatten(1, 2)  # [S + 1, B * p, C]

    def run() -> Tensor:
        assert world.labels is not None
        with torch.autocast("cpu", torch.bfloat16, enabled=entry.precision == "bf16"):
            return sample_baseline(
                public, baseline, world.labels, world.orders, noise_of, sampling, counts, chosen
            )  # [B, C, h, w]

    return Contender(PUBLIC, entry.precision, run)
