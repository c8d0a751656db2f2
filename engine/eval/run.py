"""One evaluation from beginning to end: generate what is missing, detect, score, write.

<output_dir>/generation.json says what the images there were made with; another model or other settings are refused, so
that images of two models never mix. Everything else is made anew from the images each time.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from engine.data.scenes import Scene, empty_layout
from engine.eval.bounds import bound_identity
from engine.eval.generation import generate_chunk, is_generated, missing_chunks
from engine.eval.judge import Json, Row, detect, detection_batches
from engine.eval.names import NO_LAYOUT, REAL, VAE
from engine.eval.pictures import PictureOf, folder_pictures, image_path
from engine.eval.plan import EvaluationRun, PictureRow, generation_identity
from engine.eval.results import write_everything, write_json
from engine.eval.targets import EvalSet, Target
from models.frozen.base import ImageCodec
from util.distributed import DistInfo, barrier
from util.images import Picture, to_model_range, to_picture
from util.logging import progress
from util.output import held_folder, remove_unfinished
from util.read import read_json

logger = logging.getLogger(__name__)

IDENTITY_FILE = "generation.json"


def round_trip(codec: ImageCodec, eval_set: EvalSet) -> PictureOf:
    """The real pictures encoded (the posterior's mode, or codes) and decoded: the best that a model could make."""

    @torch.no_grad()
    def picture_of(target: Target) -> Picture:
        pixels = to_model_range(eval_set.picture(target))[None].to(codec.device)  # [1, 3, H, W]
        return to_picture(codec.decode(codec.mode(codec.encode(pixels)))[0])

    return picture_of


def run_evaluation(run: EvaluationRun) -> str:
    """Does it all and returns the table as text. The bounds come first: what is wrong with a photograph is said before
    images are generated. Raises ValueError, FileNotFoundError or OutputError."""
    with held_folder(run.output_dir) if run.dist.is_main else nullcontext():
        return _run_evaluation(run)


def _run_evaluation(run: EvaluationRun) -> str:
    bounds, own = bound_rows(run), model_rows(run)
    if run.generation is not None:
        require_same_generation(run)
    detections = {row.name: detect_row(run, row) for row in bounds}
    if run.generation is not None and not run.rescore:
        keep_generation(run)
        generate(run)
    barrier()
    detections |= {row.name: detect_row(run, row) for row in own}
    rows = [*bounds, *own]
    quality = measure_quality(run, rows)
    table = ""
    if run.dist.is_main:
        table = write_everything(run, rows, detections, quality)
    barrier()
    return table


def require_same_generation(run: EvaluationRun) -> None:
    """Compares with the generation.json that is there, if one is; ValueError names field and both values."""
    path, identity = run.output_dir / IDENTITY_FILE, generation_identity(run)
    if path.is_file():
        before = read_json(path, "record of a generation")
        if not isinstance(before, dict):
            raise ValueError(f"{path} must hold a json object, got a {type(before).__name__}; remove that folder")
        for key, value in identity.items():
            if before.get(key) != json.loads(json.dumps(value)):
                raise ValueError(
                    f"{path}: the images there were made with {key} {before.get(key)!r}, this command has {value!r}; "
                    "choose another --output_dir, or remove that folder"
                )
    elif run.rescore:
        raise FileNotFoundError(f"--rescore: no {path}, so no images were generated there")
    if run.rescore:
        targets, sets = run.eval_set.targets, image_sets(run)
        missing = sum(not is_generated(folder, target) for _, _, folder, _ in sets for target in targets)
        if missing:
            raise FileNotFoundError(f"--rescore: {missing} of {len(targets) * len(sets)} images are missing")


def keep_generation(run: EvaluationRun) -> None:
    """Writes generation.json before the first image, where it is not there yet; what was being written when an earlier
    run was killed goes away."""
    path = run.output_dir / IDENTITY_FILE
    if run.dist.is_main:
        remove_unfinished(run.output_dir, run.output_dir / "detections", *(each[2] for each in image_sets(run)))
        if not path.is_file():
            write_json(path, generation_identity(run))
    barrier()


def image_sets(run: EvaluationRun) -> list[tuple[str, int, Path, dict[int, Scene]]]:
    """(row name, seed, folder, scenes by image id) of everything that is generated."""
    assert run.generation is not None
    scenes = {target.image_id: target.scene for target in run.eval_set.targets}
    sets = [(run.name, "seed", scenes)]
    if run.no_layout_run:
        bare = {image_id: Scene(scene.prompt, empty_layout(), []) for image_id, scene in scenes.items()}
        sets.append((NO_LAYOUT, "no_layout_seed", bare))
    folder = run.output_dir / "images"
    return [
        (name, seed, folder / f"{stem}_{seed}", wanted) for name, stem, wanted in sets for seed in run.generation.seeds
    ]


def generate(run: EvaluationRun) -> None:
    """Makes the images that are not there yet."""
    assert run.generation is not None
    plan, targets = run.generation.plan, run.eval_set.targets
    sets = image_sets(run)
    todo = [(each, chunk) for each in sets for chunk in missing_chunks(each[2], targets, plan)]
    num_images = sum(len(chunk) for _, chunk in todo)
    if num_images:
        logger.info("generating %d of %d images on this process", num_images, len(targets) * len(sets))
    with bar(run.dist, len(todo) * plan.config.num_passes, "generating (iterations)") as ticks:
        for (_, seed, folder, scenes), chunk in todo:
            generate_chunk(run.generation.pipeline, chunk, scenes, seed, plan, folder, ticked(ticks))


def bound_rows(run: EvaluationRun) -> list[PictureRow]:
    """The real images, and what the VAE leaves of them."""
    rows = []
    if run.real_bound:
        rows.append(PictureRow(REAL, "bound", (None,), (run.eval_set.picture,), (None,), {}))
    if run.round_trip is not None:
        rows.append(PictureRow(VAE, "bound", (None,), (run.round_trip,), (None,), {"vae": run.vae_id}))
    return rows


def model_rows(run: EvaluationRun) -> list[PictureRow]:
    """The model and its control, in the table's order."""
    if run.generation is None:
        assert run.folder_pictures is not None
        return [PictureRow(run.name, "model", (None,), (run.folder_pictures,), (None,))]
    rows = []
    sets = image_sets(run)
    for name in dict.fromkeys(name for name, *_ in sets):
        own = [(seed, folder) for set_name, seed, folder, _ in sets if set_name == name]
        folders = tuple(folder for _, folder in own)
        sources = tuple(generated_pictures(run.eval_set.targets, folder) for folder in folders)
        kind = "control" if name == NO_LAYOUT else "model"
        rows.append(PictureRow(name, kind, tuple(seed for seed, _ in own), sources, folders))
    return rows


def generated_pictures(targets: Sequence[Target], folder: Path) -> PictureOf:
    return folder_pictures({target.image_id: image_path(folder, target) for target in targets})


def detect_row(run: EvaluationRun, row: PictureRow) -> Row:
    """Runs the detector over all pictures of a row, or takes a bound's detections from where they are kept."""
    targets, size = run.eval_set.targets, run.detector_batch_size
    own = len(range(run.dist.rank, len(detection_batches(targets, size)), run.dist.world_size))

    def detect_all(source: PictureOf) -> list[Json]:
        with bar(run.dist, own, f"detecting: {row.name}") as ticks:
            return detect(run.judge, targets, source, run.dist, size, ticked(ticks))

    if row.made_of is None or run.bounds is None:
        return Row(row.name, row.kind, row.seeds, tuple(detect_all(source) for source in row.sources))
    identity = bound_identity(row.name, run.eval_set, run.judge, row.made_of, run.dist.device)
    image_ids = [target.image_id for target in targets]
    found = run.bounds.detections(identity, image_ids, lambda: detect_all(row.sources[0]), run.dist)
    return Row(row.name, row.kind, row.seeds, (found,))


def measure_quality(
    run: EvaluationRun, rows: Sequence[PictureRow]
) -> dict[str, tuple[dict[str, float], dict[str, str]]]:
    """Numbers and notes by row name; nothing where no metric was asked for."""
    if run.quality is None:
        return {}
    references = run.quality.references(run.eval_set, run.dist) if run.real_bound else []
    return {row.name: run.quality.measure(run.eval_set.targets, row.sources, references, run.dist) for row in rows}


def ticked(ticks: tqdm[Any]) -> Callable[[], None]:
    """Moves the bar by one."""

    def tick() -> None:
        ticks.update()

    return tick


def bar(dist: DistInfo, total: int, description: str) -> AbstractContextManager[tqdm[Any]]:
    """A progress bar with the time that is left, on rank 0."""
    return progress(total=total, desc=description, rank=dist.rank)
