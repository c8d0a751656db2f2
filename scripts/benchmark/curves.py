"""How the sampler's time grows: with images, iterations, boxes, slots and threads, on a small model of 256 tokens.

The weights are random, which does not matter to the time. Every curve changes one number of one setting; its points
take turns, as contenders do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.sampling.config import SamplingConfig
from models.sampling.sampler import sample
from models.structmar import StructMAR
from scripts.benchmark.timing import interleave
from scripts.benchmark.world import build_world, random_model

SAMPLING = SamplingConfig(num_iter=8, num_sampling_steps=10, cfg_text=3.0, cfg_layout=3.0)
REPEATS = 3


@dataclass(frozen=True)
class Setting:
    """boxes: of every image; slots: the model's --max_objects."""

    images: int = 1
    iterations: int = 8
    boxes: int = 2
    slots: int = 16
    threads: int = 1


CURVES: dict[str, dict[int, Setting]] = {
    "images": {n: Setting(images=n) for n in (1, 2, 4, 8, 16)},
    "images, 2 threads": {n: Setting(images=n, threads=2) for n in (1, 2, 4, 8, 16)},
    "iterations": {n: Setting(iterations=n) for n in (8, 16, 32, 64, 128, 256)},
    "boxes of 16 slots": {n: Setting(boxes=n) for n in (1, 2, 4, 8, 16)},
    "boxes, as many slots": {n: Setting(boxes=n, slots=n) for n in (1, 4, 16, 32, 64)},
}


@dataclass(frozen=True)
class Curve:
    """seconds: the median at each value of `name`."""

    name: str
    seconds: dict[int, float]


def measure_curve(name: str) -> Curve:
    """The number of threads is put back afterwards."""
    threads = torch.get_num_threads()
    models: dict[int, StructMAR] = {}  # by slots
    for setting in CURVES[name].values():
        models.setdefault(setting.slots, small_model(setting.slots))
    runs = {value: sampler(models[setting.slots], setting) for value, setting in CURVES[name].items()}
    try:
        for run in runs.values():
            run()  # warm up
        times = interleave(runs, REPEATS)
    finally:
        torch.set_num_threads(threads)
    return Curve(name, {value: times[value].median for value in runs})


def can_run(name: str) -> bool:
    """Whether the process may use as many cores as the curve has threads."""
    return max(setting.threads for setting in CURVES[name].values()) <= len(os.sched_getaffinity(0))


def small_model(slots: int) -> StructMAR:
    sizes = {"img_size": 256, "vae_stride": 16, "buffer_size": 64, "max_objects": slots}
    return random_model("mar_mini", num_categories=80, text_dim=64, **sizes)


def sampler(model: StructMAR, setting: Setting) -> Callable[[], Tensor]:
    world = build_world(model, setting.images, num_objects=setting.boxes)
    config = replace(SAMPLING, num_iter=setting.iterations)

    def run() -> Tensor:
        torch.set_num_threads(setting.threads)
        generators = [torch.Generator().manual_seed(seed) for seed in range(setting.images)]
        return sample(model, config, generators, world.text, world.layout).latents

    return run


HEADER = ("growth with", "seconds (value: median)", "first to last")


def cells(curve: Curve) -> list[str]:
    values = list(curve.seconds.values())
    points = ", ".join(f"{value}: {seconds:.3g}" for value, seconds in curve.seconds.items())
    return [curve.name, points, f"x {values[-1] / values[0]:.1f}"]
