"""Everything that a run reads, looked at before its first step: pictures, cached items and what they were made of.

Cheap for pictures (a header and an end each, in threads) and once through the cache. What was found whole is noted in
one small file; as long as the paths, sizes and times of all files are those that were noted, the next start asks only
for these. A note that cannot be read or written costs time, nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar

from engine.data.cache import LatentCache, TextCache
from engine.data.classes import ClassDataset
from engine.data.coco import CocoLayoutDataset
from engine.data.shards import MAKE_AGAIN
from engine.data.sources import Photograph, photographs_of
from util.logging import progress
from util.output import write_text_atomic
from util.picture_files import check_picture
from util.read import short_path

logger = logging.getLogger(__name__)

NOTE_NAME = "checked.json"
NUM_THREADS = 16  # they wait for a disk, or for a network
SHOWN_FROM = 2000  # items: fewer are done before a bar could be read
T = TypeVar("T")


@dataclass(frozen=True)
class DataCheck:
    """What was found in order. summary: a line for each kind. note: what to remember, "" for nothing."""

    summary: tuple[str, ...] = ()
    note: str = ""

    def remember(self, folder: str | Path) -> None:
        """Writes the note into a folder, for the next check there."""
        if self.note:
            try:
                write_text_atomic(Path(folder) / NOTE_NAME, json.dumps({"checked": self.note}) + "\n")
            except OSError as error:
                logger.info("%s: the data will be checked again at the next start", error)


def check_dataset(dataset: CocoLayoutDataset | ClassDataset, folder: str | Path) -> DataCheck:
    """Checks the files that this dataset reads, unless `folder` has the note that they were, as they are.

    Raises FileNotFoundError or ValueError, naming the first file that is missing, damaged or of something else.
    """
    return _check_classes(dataset, folder) if isinstance(dataset, ClassDataset) else _check_coco(dataset, folder)


def _check_classes(dataset: ClassDataset, folder: str | Path) -> DataCheck:
    index, latents = dataset.index, dataset.latents
    photographs, shards = index.photographs(), [] if latents is None else latents.shard_files()
    entries = f"{index.folder}: {len(photographs)} pictures of {len(index.classes)} classes"
    note = _note_of([photograph.path for photograph in photographs] + shards, ())
    if note == _noted(Path(folder)):
        return DataCheck((entries, _as_before(photographs, shards)), note)
    if latents is None:
        return DataCheck((entries, check_pictures(photographs, None)), note)
    return DataCheck((entries, check_cache(latents), check_sources(latents, photographs)), note)


def _check_coco(dataset: CocoLayoutDataset, folder: str | Path) -> DataCheck:
    index, caches = dataset.index, [each for each in (dataset.latents, dataset.texts) if each is not None]
    photographs = photographs_of(index) if dataset.has_images else []
    shards = [file for cache in caches for file in cache.shard_files()]
    num_captions = sum(len(image.captions) for image in index.images)
    entries = f"{index.split}: the entries of {len(index)} images and {num_captions} captions are in order"
    paths = [photograph.path for photograph in photographs] + shards
    note = _note_of(paths, [photograph.size for photograph in photographs])
    if note == _noted(Path(folder)):
        return DataCheck((entries, _as_before(photographs, shards)), note)
    found = [check_cache(cache) for cache in caches]
    if dataset.latents is not None:
        found.append(check_sources(dataset.latents, photographs))
    elif photographs:
        found.append(check_pictures(photographs, index.named_in))
    return DataCheck((entries, *found), note)


def check_pictures(photographs: Sequence[Photograph], named_in: str | None) -> str:
    """Raises FileNotFoundError or ValueError naming the first file that is missing, cut off, no picture, or of another
    size than `named_in` says (None: nothing does). Returns what it has looked at, in words."""
    _each(lambda one: check_picture(one.path, one.size, named_in or ""), photographs, "checking pictures")
    sizes = " and whole" if named_in is None else f", whole and of the size that {named_in} says"
    return f"{len(photographs)} pictures are there{sizes}"


def check_cache(cache: LatentCache | TextCache) -> str:
    """Raises ValueError naming the first shard and item that is not what was written, or not finite."""
    _each(cache.verify, range(len(cache.shard_files())), f"checking {cache.path.name}", unit="shard")
    return f"{cache.path}: {len(cache)} items are what was written, and finite"


def check_sources(cache: LatentCache, photographs: Sequence[Photograph]) -> str:
    """Raises ValueError naming the first picture that is not the one its latents were made of, and both values.

    Pictures that are not on this machine cannot be compared; their number is said.
    """
    sources = cache.sources()

    def is_there(photograph: Photograph) -> bool:
        try:
            difference = sources[photograph.id].difference(photograph)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise ValueError(f"image {short_path(photograph.path)} cannot be read: {error.strerror}") from error
        if difference is not None:
            raise ValueError(
                f"image {short_path(photograph.path)} is not what the cache {cache.path} was made of: {difference}. For "
                f"this cache: {MAKE_AGAIN}"
            )
        return True

    num_there = sum(_each(is_there, photographs, "comparing pictures"))
    if num_there < len(photographs):
        away = f"{len(photographs) - num_there} of {len(photographs)} pictures are not on this machine"
        logger.info("%s: %s, so it cannot be seen whether they are those it was made of", cache.path, away)
    return f"{cache.path}: {num_there} of {len(photographs)} pictures are here, and those it was made of"


def _each(check: Callable[[T], bool | None], items: Sequence[T], description: str, unit: str = "file") -> list[bool]:
    """Runs `check` on all items, in threads; what it raises for the first bad one (in their order) is raised."""
    is_shown = len(items) >= SHOWN_FROM
    results = []
    with progress(total=len(items), desc=description, unit=unit) if is_shown else nullcontext() as bar:
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            for result in pool.map(check, items):
                results.append(bool(result))
                if bar is not None:
                    bar.update()
    return results


def _as_before(photographs: Sequence[Photograph], shards: Sequence[Path]) -> str:
    return f"{len(photographs)} pictures and {len(shards)} shards of caches are as they were when checked before"


def _note_of(paths: Sequence[Path], sizes: Sequence[tuple[int, int] | None]) -> str:
    """Another one if anything that a check depends on is another: paths, sizes and times of files, sizes in the json
    (of the first ones)."""
    digest = hashlib.sha256()
    for line in zip_longest(_each_stated(paths), sizes):
        digest.update(f"{line}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _each_stated(paths: Sequence[Path]) -> Iterable[tuple[str, int, int] | tuple[str]]:
    def stated(path: Path) -> tuple[str, int, int] | tuple[str]:
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            return (str(path),)
        return str(path), status.st_size, status.st_mtime_ns

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(stated, paths))


def _noted(folder: Path) -> str | None:
    try:
        content = json.loads((folder / NOTE_NAME).read_bytes())
        return str(content["checked"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
