"""The files that an evaluation leaves, results.json last: it knows the sha256 of those that its numbers are made of.

Equal images give an equal results.json: it holds no times, no paths and nothing that depends on the number of
processes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from engine.eval.judge import Json, Row, Scorer, add_percent_of_bound, shuffle_layouts, without_nan
from engine.eval.names import (
    NO_LAYOUT,
    PER_IMAGE_FILE,
    REAL,
    RESULTS_FILE,
    SHUFFLED,
    VAE,
    detections_file,
    ground_truth_file,
)
from engine.eval.pictures import image_path
from engine.eval.plan import EvaluationRun, PictureRow, generation_identity
from engine.eval.report.page import RESULTS_FORMAT, format_table, write_report
from util.images import Picture, load_image
from util.output import write_text_atomic


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
    out = run.output_dir
    contents = {ground_truth_file(out, kind): as_json(truth) for kind, truth in scorer.ground_truth.items()}
    for row in detections.values():
        for seed, found in zip(row.seeds, row.detections, strict=True):
            contents[detections_file(out, row.name, seed)] = as_json(found)
    contents[out / PER_IMAGE_FILE] = "".join(json.dumps(line) + "\n" for line in without_nan(lines))
    remove_others(out / "detections", contents)
    for path, content in contents.items():
        write_text_atomic(path, content)
    results["files"] = {path.relative_to(out).as_posix(): _sha256(content) for path, content in contents.items()}
    write_report(results, without_nan(lines), out, out / "report.html", gallery_source(run))
    write_json(out / RESULTS_FILE, results)
    return format_table(results)


def remove_others(folder: Path, kept: Collection[Path]) -> None:
    """Removes detections of rows that this evaluation does not have: an earlier one may have had another name."""
    for path in folder.glob("*.json"):
        if path not in kept:
            path.unlink()


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
        skipped[NO_LAYOUT] = "not asked for (--without_layout)"
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


def write_json(path: Path, content: Any) -> None:
    write_text_atomic(path, as_json(content, indent=1))


def as_json(content: Any, indent: int | None = None) -> str:
    return json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


def _sha256(content: str) -> str:
    return hashlib.sha256(content.encode("utf-8")).hexdigest()
