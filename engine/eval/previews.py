"""Pictures of a run while it trains: the same scenes with the same seeds every time, sampled with the EMA weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.fsdp import FSDPModule

from engine.data.scenes import Scene
from engine.sample.grid import scene_grid
from engine.sample.pipeline import StructMARPipeline
from engine.train.parallel import unsharded
from models.sampling.config import SamplingConfig
from util.distributed import DistInfo
from util.ema import Ema
from util.images import Picture, save_png
from util.logging import MetricWriter
from util.rng import derive_seed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preview:
    """Called by the loop on every process (a sharded model needs all of them); rank 0 writes samples/step-N.png.

    labels: the class of each picture, where these are drawn instead of the scenes, whose captions name them."""

    pipeline: StructMARPipeline
    ema: Ema
    scenes: Sequence[Scene]
    config: SamplingConfig
    seed: int
    batch_size: int
    precision: str
    dist: DistInfo
    folder: Path
    labels: Sequence[int] | None = None

    def __call__(self, step: int, writer: MetricWriter) -> None:
        if not self.dist.is_main and not isinstance(self.pipeline.model, FSDPModule):
            return
        seeds = [derive_seed(self.seed, "preview", index) for index in range(len(self.scenes))]
        with self.ema.applied(), unsharded(self.pipeline.model):
            images = self._draw(seeds)
        if not self.dist.is_main:
            return
        grid = scene_grid(images, self.scenes)
        path = self.folder / f"step-{step:07d}.png"
        save_png(grid, path)
        writer.image(step, "samples", grid)
        logger.info("%d samples at step %d: %s", len(images), step, path)

    def _draw(self, seeds: Sequence[int]) -> list[Picture]:
        options = (self.config, seeds, self.batch_size, self.precision)
        if self.labels is None:
            return self.pipeline.draw(self.scenes, *options)
        return self.pipeline.draw_classes(self.labels, *options)
