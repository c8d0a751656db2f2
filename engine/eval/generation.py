"""The pictures an evaluation looks at: a folder that any model wrote, or images generated here, sharded and resumable.

Generated images lie in <folder>/<stem of the dataset's file name>.png. They are made in fixed chunks of consecutive
targets, so that an interrupted run which goes on makes the very same batches, hence the same pixels.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from engine.data.scenes import Scene
from engine.eval.targets import Target
from engine.sample.pipeline import StructMARPipeline
from models.sampling.config import SamplingConfig
from util.distributed import DistInfo
from util.images import Picture, load_image, save_png
from util.rng import derive_seed

logger = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
PictureOf = Callable[[Target], Picture]


def image_path(folder: Path, target: Target) -> Path:
    """Where a generated image of this target lies."""
    return folder / f"{Path(target.file_name).stem}.png"


def find_images(folder: str | Path, targets: Sequence[Target], source_size: bool = False) -> dict[int, Path]:
    """The picture of every target in a folder of any model, by image id; checked before anything else is done.

    A file belongs to the image whose id its name is (with or without leading zeros), or whose file name it shares.
    source_size: pictures have the size of the dataset's photographs instead of the profile's.
    Raises FileNotFoundError for a missing folder or images, ValueError for two files of one image, a file that is no
    image, or another size; each names the files and both values.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"--images {folder} is not a folder")
    by_name: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES:
            by_name.setdefault(str(int(path.stem)) if path.stem.isdecimal() else path.stem, []).append(path)
    found: dict[int, Path] = {}
    missing = []
    for target in targets:
        names = dict.fromkeys([str(target.image_id), Path(target.file_name).stem])
        paths = [path for name in names for path in by_name.get(name, [])]
        if len(paths) > 1:
            raise ValueError(
                f"{folder} has {len(paths)} files for image {target.image_id}: {paths[0].name}, {paths[1].name}"
            )
        if paths:
            found[target.image_id] = paths[0]
        else:
            missing.append(target)
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of {len(targets)} images, the first is {missing[0].image_id} "
            f"(named {missing[0].image_id}.png, {Path(missing[0].file_name).stem}.png or the same as .jpg)"
        )
    num_others = sum(len(paths) for paths in by_name.values()) - len(found)
    if num_others:
        logger.info("%s holds %d other images, which this evaluation does not ask for", folder, num_others)
    for target in targets:
        check_picture_file(found[target.image_id], target.source_size if source_size else target.size)
    return found


def check_picture_file(path: Path, size: tuple[int, int]) -> None:
    """Raises ValueError if the file cannot be an image of this (width, height)."""
    try:
        with Image.open(path) as image:
            found = image.size
            image.verify()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"cannot read image {path}: {error}") from error
    if found != size:
        raise ValueError(f"{path} is {found[0]}x{found[1]} pixels, the profile asks for {size[0]}x{size[1]}")


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
    """The chunks of this process that are not there yet in full."""
    chunks = [targets[start : start + plan.chunk] for start in range(0, len(targets), plan.chunk)]
    own = chunks[plan.dist.rank :: plan.dist.world_size]
    return [chunk for chunk in own if not all(image_path(folder, target).is_file() for target in chunk)]


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
    wanted = [scenes[target.image_id] for target in chunk]
    pictures = pipeline.draw(wanted, plan.config, seeds, plan.chunk, plan.precision, progress)
    for target, image_seed, picture in zip(chunk, seeds, pictures, strict=True):
        path = image_path(folder, target)
        temporary = path.with_suffix(f".{plan.dist.rank}.tmp")
        save_png(picture, temporary, {"prompt": scenes[target.image_id].prompt, "seed": str(image_seed)})
        os.replace(temporary, path)


def folder_pictures(paths: Mapping[int, Path]) -> PictureOf:
    """Reads pictures as they are."""

    def picture_of(target: Target) -> Picture:
        return np.asarray(load_image(paths[target.image_id]))

    return picture_of
