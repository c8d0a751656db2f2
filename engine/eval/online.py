"""Layout scores while a run trains: the code of scripts/evaluate_layout.py on the first layouts of a profile.

Every round samples the same layouts with the same seeds from the EMA weights, so the curve shows the training alone.
With so few images it is for watching; numbers to report come from scripts/evaluate_layout.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch.distributed.fsdp import FSDPModule

from engine.eval.judge import Judge, Row, Scorer, detect
from engine.eval.targets import EvalSet, Target
from engine.sample.pipeline import StructMARPipeline
from engine.train.parallel import unsharded
from models.sampling.config import SamplingConfig
from util.distributed import DistInfo, gather_objects
from util.ema import Ema
from util.images import Picture
from util.logging import MetricWriter
from util.rng import derive_seed

logger = logging.getLogger(__name__)

SHOWN = (
    ("conditioned", "AP"),
    ("conditioned", "AP50"),
    ("layout", "mIoU"),
    ("layout", "SR50"),
    ("layout", "extra_rate"),
)


@dataclass(frozen=True)
class OnlineEvaluation:
    """Called by the loop on every process; rank 0 writes eval/AP50, eval/mIoU and so on to the run's metrics.

    on_scores: is told step and scores under these names, on every process."""

    pipeline: StructMARPipeline
    ema: Ema
    eval_set: EvalSet
    judge: Judge
    config: SamplingConfig
    seed: int
    batch_size: int
    precision: str
    dist: DistInfo
    on_scores: Callable[[int, Mapping[str, float]], None] | None = None

    def __call__(self, step: int, writer: MetricWriter) -> None:
        self.score(step, writer)

    def score(self, step: int, writer: MetricWriter) -> dict[str, float]:
        """The numbers of SHOWN, on every process; rank 0 has written them."""
        pictures = self.sample()
        found = detect(
            self.judge,
            self.eval_set.targets,
            lambda target: pictures[target.image_id],
            self.dist,
            self.batch_size,
        )
        values: dict[str, float] = {}
        if self.dist.is_main:
            entry, _ = Scorer(self.eval_set, num_resamples=1).score(Row("model", "model", (self.seed,), (found,)))
            values = {name: float(entry[part][name]["value"]) for part, name in SHOWN}
            writer.scalars(step, {f"eval/{name}": value for name, value in values.items()})
            shown = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
            logger.info("evaluation of %d layouts at step %d: %s", len(self.eval_set.targets), step, shown)
        values = gather_objects(values)[0]
        if self.on_scores is not None:
            self.on_scores(step, {f"eval/{name}": value for name, value in values.items()})
        return values

    def sample(self) -> dict[int, Picture]:
        """Pictures by image id. Processes share the work, except where a sharded model needs all in every batch."""
        is_sharded = isinstance(self.pipeline.model, FSDPModule)
        rank, world_size = (0, 1) if is_sharded else (self.dist.rank, self.dist.world_size)
        targets = self.eval_set.targets
        batches = [targets[start : start + self.batch_size] for start in range(0, len(targets), self.batch_size)]
        own: dict[int, Picture] = {}
        with self.ema.applied(), unsharded(self.pipeline.model):
            for batch in batches[rank::world_size]:
                own |= self._sample_batch(batch)
        if is_sharded:
            return own
        return {image_id: picture for part in gather_objects(own) for image_id, picture in part.items()}

    def _sample_batch(self, batch: Sequence[Target]) -> dict[int, Picture]:
        scenes = [target.scene for target in batch]
        seeds = [derive_seed(self.seed, "online evaluation", target.image_id) for target in batch]
        pictures = self.pipeline.draw(scenes, self.config, seeds, self.batch_size, self.precision)
        return {target.image_id: picture for target, picture in zip(batch, pictures, strict=True)}
