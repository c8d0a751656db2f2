"""A folder of samples: NNNN.png, grid.png (or page.md) and samples.json of one run, whole at any moment.

A run writes into a folder of its own inside (`UNFINISHED`). Once that is whole it is renamed (`FINISHED`): from then on
the new run counts, and its files are moved into place. A run that was killed while it moved them is moved on by the
next one. Files that are not of this program stay as they are.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import UnidentifiedImageError

from models.mars.sampling import DrawOptions
from models.sampling.config import SamplingConfig
from util.images import read_png_text

LIST_NAME, GRID_NAME = "samples.json", "grid.png"
PAGE_NAME = "page.md"  # of words and pictures in turn, in the place of a grid
MADE_WITH = "settings"  # the text that every PNG of this program has
UNFINISHED, FINISHED = ".samples-unfinished", ".samples-finished"
_PICTURE = re.compile(r"\d{4,}\.png")


def picture_name(index: int) -> str:
    return f"{index:04d}.png"


def picture_text(
    entry: Mapping[str, Any],
    config: SamplingConfig | DrawOptions,
    checkpoint: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> dict[str, str]:
    """The text of one PNG: strings as they are, everything else as json. entry: what the picture was made from, as in a
    layout file, and its seed; checkpoint: `pipeline.describe()`; settings: of the program."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in entry.items()}
    made_with = {"sampling": asdict(config), "checkpoint": checkpoint, MADE_WITH: settings}
    return texts | {key: json.dumps(value) for key, value in made_with.items()}


def require_free(folder: Path, num_images: int, overview: str = GRID_NAME) -> None:
    """Raises ValueError naming the first file in the way of these images that this program did not write. overview:
    what lies beside them, a grid or a page."""
    names = [*map(picture_name, range(num_images)), overview, LIST_NAME]
    own = _own_files(folder)
    for name in names:
        path = folder / name
        if os.path.lexists(path) and name not in own:
            raise ValueError(f"{path} is in the way and was not written by scripts.sample: choose another --output_dir")


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Gives an empty folder to write a run's files into, which replace an earlier run's when the block ends well."""
    _move_into_place(folder)
    unfinished = folder / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(folder / FINISHED)
        _move_into_place(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _move_into_place(folder: Path) -> None:
    """Moves what a finished run left apart, the list last, and removes pictures that it does not name."""
    finished = folder / FINISHED
    if not finished.is_dir():
        return
    with _signals_wait():
        own = _own_files(folder)
        source = finished if (finished / LIST_NAME).is_file() else folder
        named = {LIST_NAME, *_listed(source / LIST_NAME)}
        named |= set() if PAGE_NAME in named else {GRID_NAME}
        for name in sorted(os.listdir(finished), key=lambda name: (name == LIST_NAME, name)):
            os.replace(finished / name, folder / name)
        for name in own - named:
            (folder / name).unlink()
        finished.rmdir()


def _own_files(folder: Path) -> set[str]:
    """The names of the files that a run of this program wrote: its list names them, or they say so themselves."""
    if not folder.is_dir():
        return set()
    listed = _listed(folder / LIST_NAME)
    own = {LIST_NAME} if listed else set()
    for name in os.listdir(folder):
        is_png = _PICTURE.fullmatch(name) or name == GRID_NAME
        if name in listed if name == PAGE_NAME else is_png and (name in listed or _is_own_png(folder / name)):
            own.add(name)
    return own


def _listed(path: Path) -> Collection[str]:
    """The pictures and the page that a list names; none where the file is missing or no list of ours."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = {str(entry["file"]) for entry in content["images"]}
        return names | {PAGE_NAME} if "page" in content else names
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return set()


def _is_own_png(path: Path) -> bool:
    try:
        return MADE_WITH in read_png_text(path)
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError):
        return False


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Ctrl-C and SIGTERM are held back for the moment that the files move."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
