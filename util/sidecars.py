"""Pictures with sidecars in a folder and those below it: photo.jpg, its boxes in photo.bbox, its captions in photo.txt.

What the files hold: sidecar_files.py. A label that is no category counts as a phrase. Without .bbox a picture has no
boxes, without .txt no captions.

The pictures become the entries that COCO's jsons give, so that all else reads them as it reads COCO. Ids are digests of
the pictures' names below the root: they stay as they are when other pictures come or go.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from util.coco_json import BoxEntry, CaptionEntry, ImageEntry, Instances
from util.picture_files import SUFFIXES, picture_size
from util.read import parse_json_lines, read_text, require_text, short_path, short_repr
from util.sidecar_files import CAPTION_SUFFIX, SIDECAR_SUFFIX, read_boxes, read_captions
from util.types import Category

logger = logging.getLogger(__name__)

TRAINED_KEYS = {"label", "bbox", "phrase"}  # of a sidecar's object
NUM_THREADS = 16  # they wait for a disk, or for a network

UnknownLabels = Literal["refuse", "phrase", "leave_out"]
"""What becomes of a box whose label is no category: an error, a box known by its phrase alone, or no box."""


@dataclass(frozen=True)
class SidecarEntries:
    """num_left_out: boxes whose labels are no categories."""

    instances: Instances
    captions: list[CaptionEntry]
    num_left_out: int


def has_sidecars(folder: Path) -> bool:
    """Whether there is one in the folder or below it."""
    return folder.is_dir() and any(folder.rglob(f"*{SIDECAR_SUFFIX}"))


def read_sidecars(root: Path, part: str, categories: tuple[Category, ...], unknown: UnknownLabels) -> SidecarEntries:
    """All pictures below <root>/<part>. Raises ValueError naming the file, the object and the values that are wrong."""
    names, folder = {category.name: category.id for category in categories}, root / part
    pictures = _pictures(folder)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        sizes = list(pool.map(lambda name: picture_size(folder / name), pictures))
    images: list[ImageEntry] = []
    boxes: list[BoxEntry | None] = []
    captions: list[CaptionEntry] = []
    unread: set[str] = set()
    for name, (width, height) in zip(pictures, sizes, strict=True):
        image = ImageEntry(_id(part, name), name, width, height)
        images.append(image)
        where, lines = _lines((folder / name).with_suffix(SIDECAR_SUFFIX))
        unread |= {key for line in lines if isinstance(line, dict) for key in line} - TRAINED_KEYS
        items = enumerate(read_boxes(lines, where, names))
        boxes += [_box(item, index, f"{where}, object {index}", image, names, unknown) for index, item in items]
        caption_file = (folder / name).with_suffix(CAPTION_SUFFIX)
        texts = read_captions(caption_file) if caption_file.is_file() else []
        captions += [CaptionEntry(_id(part, name, "caption", k), image.id, text) for k, text in enumerate(texts)]
    if unread:
        logger.info("sidecars of %s: not read: %s", short_path(folder), ", ".join(map(short_repr, sorted(unread))))
    kept = [box for box in boxes if box is not None]
    return SidecarEntries(Instances(images, kept, categories), captions, len(boxes) - len(kept))


def _pictures(folder: Path) -> list[str]:
    """Names below the folder, in their order. Raises ValueError for sidecars of no picture, or of two."""
    files = sorted(
        os.path.relpath(os.path.join(place, name), folder) for place, _, names in os.walk(folder)
        for name in names if not name.startswith(".")
    )  # fmt: skip
    pictures = [name for name in files if name.lower().endswith(SUFFIXES)]
    for name in pictures:
        require_text(name, f"the name of picture {short_path(folder / name)}")
    owner: dict[str, str] = {}
    for name in pictures:
        other = owner.setdefault(os.path.splitext(name)[0], name)
        if other != name:
            raise ValueError(
                f"{short_path(folder)}: {short_repr(other)} and {short_repr(name)} would share their sidecars"
            )
    for name in files:
        if name.endswith(SIDECAR_SUFFIX) and name.removesuffix(SIDECAR_SUFFIX) not in owner:
            raise ValueError(f"sidecar {short_path(folder / name)} has no picture beside it ({', '.join(SUFFIXES)})")
    return pictures


def _lines(path: Path) -> tuple[str, list[Any]]:
    """What errors of the sidecar begin with, and what it holds; nothing where there is none."""
    where = f"sidecar {short_path(path)}"
    text = read_text(path, "sidecar") if path.is_file() else ""
    return where, parse_json_lines(text, where) if text.strip() else []


def _box(
    item: dict[str, Any], index: int, where: str, image: ImageEntry, names: dict[str, int], unknown: UnknownLabels
) -> BoxEntry | None:
    label = " ".join(require_text(item["label"], f"{where}: 'label'").split())
    phrase = " ".join(require_text(item.get("phrase", ""), f"{where}: 'phrase'").split())
    if label not in names:
        if not phrase and not label:
            raise ValueError(f"{where}: 'label' is blank, got {short_repr(item['label'])}")
        if unknown == "refuse":
            raise ValueError(f"{where}: label {short_repr(label)} is none of the {len(names)} categories"
                             f"{_hint(label, names)}; weights with phrases (--phrases) take any")  # fmt: skip
        if unknown == "leave_out":
            return None
        phrase = phrase or label
    sides = (image.width, image.height) * 2
    x0, y0, x1, y1 = (value * side for value, side in zip(item["bbox"], sides, strict=True))
    return BoxEntry(
        _id(str(image.id), "box", index), image.id, names.get(label), (x0, y0, x1 - x0, y1 - y0), False, phrase
    )


def _hint(label: str, names: Collection[str]) -> str:
    close = difflib.get_close_matches(label[:60].lower(), list(names), n=1)
    return f", did you mean '{close[0]}'?" if close else ""


def _id(*what: str | int) -> int:
    """Below 2^62 and above all ids that people give."""
    text = "\0".join(map(str, what)).replace(os.sep, "/")
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 2**61 + 2**61
