"""What the rows of an evaluation are called, and where the detections of each lie."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

BoxesBy = Literal["class", "phrase", "both"]
BOXES_BY: tuple[BoxesBy, ...] = get_args(BoxesBy)  # what a model is told of a box
RESERVED_NAMES = REAL, VAE, NO_LAYOUT, SHUFFLED = "real images", "VAE round trip", "no layout", "shuffled layouts"
RESULTS_FILE, PER_IMAGE_FILE = "results.json", "per_image.jsonl"
MAX_NAME_BYTES = 150  # of a row's name: "_seed_<number>.json" follows it in a file name of at most 255


def detections_file(folder: Path, row: str, seed: int | None) -> Path:
    """COCO results of one row and seed (None: nothing was drawn at random) in an evaluation's folder."""
    suffix = "" if seed is None else f"_seed_{seed}"
    return folder / "detections" / f"{file_stem(row)}{suffix}.json"


def require_own_name(name: str, where: str) -> str:
    """`name` if a row can have it. Raises ValueError where it is empty, or it or its files would be another row's."""
    stem = file_stem(name).casefold()
    taken = next((other for other in RESERVED_NAMES if file_stem(other).casefold() == stem), None)
    if taken is not None:
        raise ValueError(
            f"{where} {name!r} is the name of another row, or of its files: {taken!r}; choose another --name"
        )
    if not stem.strip("_") or len(stem.encode()) > MAX_NAME_BYTES or not name.isprintable():
        raise ValueError(
            f"{where} {name!r} must be one line with a letter or digit and at most {MAX_NAME_BYTES} bytes: files are "
            "called after it; choose another --name"
        )
    return name


def file_stem(name: str) -> str:
    """A row's name as a file name."""
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def ground_truth_file(folder: Path, kind: str) -> Path:
    """COCO instances of one kind of ground truth ("full", "conditioned") in an evaluation's folder."""
    return folder / f"ground_truth_{kind}.json"
