"""Everything that an evaluation needs, checked and loaded: what is scored, by what, and where it goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.eval.bounds import BoundStore
from engine.eval.generation import GenerationPlan, scenes_hash
from engine.eval.judge import Json, Judge
from engine.eval.pictures import PictureOf
from engine.eval.quality import QualityMetrics
from engine.eval.targets import EvalSet
from engine.sample.pipeline import StructMARPipeline
from util.checkpoint import sha256_tensors
from util.distributed import DistInfo


@dataclass(frozen=True)
class Generation:
    """A model and how images are drawn from it, once for every seed."""

    pipeline: StructMARPipeline
    plan: GenerationPlan
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class EvaluationRun:
    """Everything checked and loaded. name: of the model's row. folder_pictures: instead of a generation.

    round_trip: real pictures through the VAE of sha256 vae_id, None without that bound. bounds: where bounds are kept
    for other evaluations, None: nowhere. source: what results.json says of a folder.
    """

    eval_set: EvalSet
    judge: Judge
    skipped_categories: Sequence[str]
    is_reward: bool
    name: str
    generation: Generation | None
    folder_pictures: PictureOf | None
    source: Mapping[str, Any]
    real_bound: bool
    round_trip: PictureOf | None
    vae_id: str | None
    bounds: BoundStore | None
    no_layout_run: bool
    quality: QualityMetrics | None
    num_resamples: int
    detector_batch_size: int
    rescore: bool
    dist: DistInfo
    output_dir: Path


@dataclass(frozen=True)
class PictureRow:
    """A row before detection: where its pictures come from, by seed. folders: where they lie, None: not in files.

    made_of: of a bound, what its photographs went through; None for rows of a model.
    """

    name: str
    kind: str
    seeds: tuple[int | None, ...]
    sources: tuple[PictureOf, ...]
    folders: tuple[Path | None, ...]
    made_of: Json | None = None


def generation_identity(run: EvaluationRun) -> Json:
    """What makes the pixels, as plain values."""
    assert run.generation is not None
    pipeline, plan = run.generation.pipeline, run.generation.plan
    checkpoint = {key: value for key, value in pipeline.describe().items() if key != "path"}
    return {
        **checkpoint,
        "weights_sha256": sha256_tensors(pipeline.model.state_dict()),
        "sampling": asdict(plan.config),
        "batch_size": plan.chunk,
        "precision": plan.precision,
        "scenes": scenes_hash([target.scene for target in run.eval_set.targets]),
        "ids_hash": run.eval_set.ids_hash,
    }
