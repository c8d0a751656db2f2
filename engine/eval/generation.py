"""The images of a model that an evaluation generates, sharded and resumable.

They are made in fixed chunks of consecutive targets, so that an interrupted run which goes on makes the very same
batches, hence the same pixels. Where they lie: `engine/eval/pictures.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from engine.data.scenes import Scene
from engine.eval.pictures import image_path
from engine.eval.targets import Target
from engine.sample.pipeline import StructMARPipeline
from models.sampling.config import SamplingConfig
from util.distributed import DistInfo
from util.images import save_png
from util.picture_files import check_picture
from util.rng import derive_seed


def scenes_hash(scenes: Sequence[Scene]) -> str:
    """First 12 hex digits of the sha256 of what is asked of the model: captions, boxes and names, in order."""
    content = json.dumps([scene.to_dict() for scene in scenes], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class GenerationPlan:
    """What is generated and how. chunk: images sampled at a time; it is part of what makes the pixels."""

    config: SamplingConfig
    chunk: int
    precision: str
    dist: DistInfo


def missing_chunks(folder: Path, targets: Sequence[Target], plan: GenerationPlan) -> list[Sequence[Target]]:
    """The chunks of this process that are not there yet in full; a picture cut off or of another size is not there."""
    chunks = [targets[start : start + plan.chunk] for start in range(0, len(targets), plan.chunk)]
    own = chunks[plan.dist.rank :: plan.dist.world_size]
    return [chunk for chunk in own if not all(is_generated(folder, target) for target in chunk)]


def is_generated(folder: Path, target: Target) -> bool:
    """Whether the target's picture is there, whole (by its header and its end) and of the right size."""
    try:
        check_picture(image_path(folder, target), target.size, "the profile")
    except (FileNotFoundError, ValueError):
        return False
    return True


def generate_chunk(
    pipeline: StructMARPipeline,
    chunk: Sequence[Target],
    scenes: Mapping[int, Scene],
    seed: int,
    plan: GenerationPlan,
    folder: Path,
    progress: Callable[[], None] | None = None,
) -> None:
    """Samples and writes one chunk, each file at once under its name only when it is whole. Image seeds depend on
    (`seed`, image id) alone."""
    seeds = [derive_seed(seed, "evaluation", target.image_id) for target in chunk]
    wanted = [replace(scenes[target.image_id], size=target.size[::-1]) for target in chunk]
    pictures = pipeline.draw(wanted, plan.config, seeds, plan.chunk, plan.precision, progress)
    for target, image_seed, picture in zip(chunk, seeds, pictures, strict=True):
        save_png(
            picture, image_path(folder, target), {"prompt": scenes[target.image_id].prompt, "seed": str(image_seed)}
        )
