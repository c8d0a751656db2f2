"""One evaluation from beginning to end: generate what is missing, detect, score, write.

<output_dir>/generation.json says what the images there were made with; another model or other settings are refused, so
that images of two models never mix. Everything else is made anew from the images each time, and equal images give an
equal results.json: it holds no times, no paths and nothing that depends on the number of processes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from engine.data.scenes import Scene, empty_layout
from engine.eval.generation import (
    GenerationPlan,
    generate_chunk,
    is_generated,
    missing_chunks,
    scenes_hash,
)
from engine.eval.judge import (
    Json,
    Judge,
    Row,
    Scorer,
    add_percent_of_bound,
    detect,
    detection_batches,
    shuffle_layouts,
    without_nan,
)
from engine.eval.names import NO_LAYOUT, REAL, SHUFFLED, VAE, detections_file
from engine.eval.pictures import PictureOf, folder_pictures, image_path
from engine.eval.quality import QualityMetrics
from engine.eval.report.page import RESULTS_FORMAT, format_table, write_report
from engine.eval.targets import EvalSet, Target
from engine.sample.pipeline import StructMARPipeline
from models.frozen.vae import LatentCodec
from util.checkpoint import sha256_tensors
from util.distributed import DistInfo, barrier, gather_objects
from util.images import Picture, load_image, to_model_range, to_picture
from util.logging import progress
from util.output import write_atomic
from util.read import read_json

logger = logging.getLogger(__name__)

IDENTITY_FILE = "generation.json"


@dataclass(frozen=True)
class Generation:
    """A model and how images are drawn from it, once for every seed."""

    pipeline: StructMARPipeline
    plan: GenerationPlan
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class EvaluationRun:
    """Everything checked and loaded. name: of the model's row. folder_pictures: instead of a generation.

    round_trip: real pictures through the VAE, None without that bound. source: what results.json says of a folder.
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
    no_layout_run: bool
    quality: QualityMetrics | None
    num_resamples: int
    detector_batch_size: int
    rescore: bool
    dist: DistInfo
    output_dir: Path


@dataclass(frozen=True)
class PictureRow:
    """A row before detection: where its pictures come from, by seed. folders: where they lie, None: not in files."""

    name: str
    kind: str
    seeds: tuple[int | None, ...]
    sources: tuple[PictureOf, ...]
    folders: tuple[Path | None, ...]


def round_trip(codec: LatentCodec, eval_set: EvalSet) -> PictureOf:
    """The real pictures encoded (the posterior's mode) and decoded: what a perfect model could at best make."""

    @torch.no_grad()
    def picture_of(target: Target) -> Picture:
        pixels = to_model_range(eval_set.picture(target))[None].to(codec.device)  # [1, 3, H, W]
        return to_picture(codec.decode(codec.mode(codec.encode(pixels)))[0])

    return picture_of


def run_evaluation(run: EvaluationRun) -> str:
    """Does it all and returns the table as text. The bounds come first: what is wrong with a photograph is said before
    images are generated. Raises ValueError or FileNotFoundError."""
    bounds, own = bound_rows(run), model_rows(run)
    if run.generation is not None:
        require_same_generation(run)
    detections = {row.name: detect_row(run, row) for row in bounds}
    if run.generation is not None:
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


def keep_generation(run: EvaluationRun) -> None:
    """Writes generation.json before the first image, where it is not there yet."""
    path = run.output_dir / IDENTITY_FILE
    if run.dist.is_main and not path.is_file():
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
    """Makes the images that are not there yet; with --rescore it only looks whether all are."""
    assert run.generation is not None
    plan, targets = run.generation.plan, run.eval_set.targets
    sets = image_sets(run)
    todo = [(each, chunk) for each in sets for chunk in missing_chunks(each[2], targets, plan)]
    if run.rescore:
        if any(gather_objects(len(todo))):
            missing = sum(not is_generated(folder, target) for _, _, folder, _ in sets for target in targets)
            raise FileNotFoundError(f"--rescore: {missing} of {len(targets) * len(sets)} images are missing")
        return
    num_images = sum(len(chunk) for _, chunk in todo)
    if num_images:
        logger.info("generating %d of %d images on this process", num_images, len(targets) * len(sets))
    with bar(run.dist, len(todo) * plan.config.num_iter, "generating (iterations)") as ticks:
        for (_, seed, folder, scenes), chunk in todo:
            generate_chunk(run.generation.pipeline, chunk, scenes, seed, plan, folder, ticked(ticks))


def bound_rows(run: EvaluationRun) -> list[PictureRow]:
    """The real images, and what the VAE leaves of them."""
    rows = []
    if run.real_bound:
        rows.append(PictureRow(REAL, "bound", (None,), (run.eval_set.picture,), (None,)))
    if run.round_trip is not None:
        rows.append(PictureRow(VAE, "bound", (None,), (run.round_trip,), (None,)))
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
    """Runs the detector over all pictures of a row."""
    targets, size = run.eval_set.targets, run.detector_batch_size
    found = []
    num_batches = len(detection_batches(targets, size))
    own = len(range(run.dist.rank, num_batches, run.dist.world_size))
    with bar(run.dist, own * len(row.sources), f"detecting: {row.name}") as ticks:
        for source in row.sources:
            found.append(detect(run.judge, targets, source, run.dist, size, ticked(ticks)))
    return Row(row.name, row.kind, row.seeds, tuple(found))


def measure_quality(
    run: EvaluationRun, rows: Sequence[PictureRow]
) -> dict[str, tuple[dict[str, float], dict[str, str]]]:
    """Numbers and notes by row name; nothing where no metric was asked for."""
    if run.quality is None:
        return {}
    references = run.quality.references(run.eval_set, run.dist) if run.real_bound else []
    return {row.name: run.quality.measure(run.eval_set.targets, row.sources, references, run.dist) for row in rows}


def write_everything(
    run: EvaluationRun,
    picture_rows: Sequence[PictureRow],
    detections: Mapping[str, Row],
    quality: Mapping[str, tuple[dict[str, float], dict[str, str]]],
) -> str:
    """Scores, then writes every file of --output_dir, results.json last."""
    scorer = Scorer(run.eval_set, run.num_resamples)
    rows = list(detections.values())
    if can_shuffle(run):
        model = detections[run.name]
        shuffled = tuple(shuffle_layouts(run.eval_set.targets, found) for found in model.detections)
        rows.append(Row(SHUFFLED, "control", model.seeds, shuffled))
    entries, lines = [], []
    for row in rows:
        entry, row_lines = scorer.score(row)
        values, notes = quality.get(row.name, ({}, {}))
        entries.append({**entry, "quality": values, "quality_notes": notes})
        lines += row_lines
    add_percent_of_bound(entries)
    locate_pictures(run, picture_rows, lines)
    results = without_nan({**describe(run), "rows": entries, "skipped": not_measured(run)})
    for kind, ground_truth in scorer.ground_truth.items():
        write_json(run.output_dir / f"ground_truth_{kind}.json", ground_truth, indent=None)
    for row in detections.values():
        for seed, found in zip(row.seeds, row.detections, strict=True):
            write_json(detections_file(run.output_dir, row.name, seed), found, indent=None)
    write_text(run.output_dir / "per_image.jsonl", "".join(json.dumps(line) + "\n" for line in without_nan(lines)))
    write_report(results, without_nan(lines), run.output_dir, run.output_dir / "report.html", gallery_source(run))
    write_json(run.output_dir / "results.json", results)
    return format_table(results)


def can_shuffle(run: EvaluationRun) -> bool:
    """The layouts of a single image can only be handed to itself."""
    return len(run.eval_set.targets) > 1


def describe(run: EvaluationRun) -> Json:
    """The head of results.json: protocol, data, detector, source."""
    eval_set, profile, detector = run.eval_set, run.eval_set.profile, run.judge.detector
    settings = asdict(profile)
    words = {name: settings.pop(name) for name in ("name", "description", "unknown")}
    source = dict(run.source)
    if run.generation is not None:
        source = {"kind": "checkpoint", **generation_identity(run)}
    return {
        "format": RESULTS_FORMAT,
        "profile": {**words, "hash": profile.hash, "settings": settings},
        "dataset": {
            "split": eval_set.split,
            "num_images": len(eval_set.targets),
            "ids_hash": eval_set.ids_hash,
            "num_boxes": sum(len(target.boxes_px) for target in eval_set.targets),
            "num_conditioned": sum(int(target.conditioned.sum()) for target in eval_set.targets),
            "removed": dict(eval_set.removed),
        },
        "detector": {
            "arch": detector.arch,
            "id": detector.id,
            "is_reward": run.is_reward,
            "unknown_categories": list(run.skipped_categories),
        },
        "source": source,
        "sampling": source.pop("sampling", None),
        "seeds": list(run.generation.seeds) if run.generation else [],
        "num_resamples": run.num_resamples,
    }


def not_measured(run: EvaluationRun) -> dict[str, str]:
    """What a reader may look for in the table and why it is not there."""
    skipped = {}
    if not run.real_bound:
        skipped[REAL] = "switched off (--no-real_bound)"
    if run.round_trip is None:
        skipped[VAE] = "needs the photographs, a VAE (--vae_path) and pictures of a size that fits it"
    if run.generation is not None and not run.no_layout_run:
        skipped[NO_LAYOUT] = "not asked for (--no_layout_run)"
    if not can_shuffle(run):
        skipped[SHUFFLED] = "needs at least two images"
    if run.quality is None:
        skipped["image quality"] = "not asked for (--fid, --clip_score, --features)"
    return skipped


def locate_pictures(run: EvaluationRun, rows: Sequence[PictureRow], lines: Sequence[Json]) -> None:
    """Fills in "picture", relative to --output_dir, where the row's pictures lie in it."""
    targets = {target.image_id: target for target in run.eval_set.targets}
    folders = {
        (row.name, seed): folder
        for row in rows
        for seed, folder in zip(row.seeds, row.folders, strict=True)
        if folder is not None
    }
    for line in lines:
        folder = folders.get((line["row"], line["seed"]))
        if folder is not None:
            path = image_path(folder, targets[line["image_id"]])
            line["picture"] = path.relative_to(run.output_dir).as_posix()


def gallery_source(run: EvaluationRun) -> Callable[[Mapping[str, Any]], Picture | None]:
    """The picture of a line of per_image.jsonl; None for rows that are not shown."""
    targets = {target.image_id: target for target in run.eval_set.targets}

    def picture_of(line: Mapping[str, Any]) -> Picture | None:
        if line["picture"] is not None:
            return np.asarray(load_image(run.output_dir / line["picture"]))
        if line["row"] == run.name and run.folder_pictures is not None:
            return run.folder_pictures(targets[line["image_id"]])
        return None

    return picture_of


def write_json(path: Path, content: Any, indent: int | None = 1) -> None:
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, content: str) -> None:
    write_atomic(path, lambda file: file.write(content.encode("utf-8")))


def ticked(ticks: tqdm[Any]) -> Callable[[], None]:
    """Moves the bar by one."""

    def tick() -> None:
        ticks.update()

    return tick


def bar(dist: DistInfo, total: int, description: str) -> AbstractContextManager[tqdm[Any]]:
    """A progress bar with the time that is left, on rank 0."""
    return progress(total=total, desc=description, rank=dist.rank)
