"""Output places: tested before any work, written apart and then renamed, and one program at a time in a folder.

Nothing here imports torch: the mains and scripts ask before they load anything.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"
UNFINISHED = ".tmp"  # ends the name of a file that is being written
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class OutputError(OSError):
    """A file that could not be written; the message names it and says why."""


# --- before any work -------------------------------------------------------------------------------------------------


def require_output_dir(flag: str, path: str | os.PathLike[str]) -> None:
    """Raises ValueError, one line, if files cannot be written into the folder `path` (which need not exist yet).

    flag: with its dashes, for the message. Nothing is made: an unnamed file is tried in the nearest folder that exists.
    """
    _refuse_name(flag, path)
    try:
        place = _nearest_existing(Path(path))
        if not place.is_dir():
            what = "is a file" if place == Path(path) else f"cannot be made: {place} is a file"
            raise ValueError(f"{flag} {path} {what}, it must be a folder")
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be written: {error.strerror}") from error


def require_output_file(flag: str, path: str | os.PathLike[str]) -> None:
    """The same for a file to be written (or replaced)."""
    _refuse_name(flag, path)
    if os.path.isdir(path):
        raise ValueError(f"{flag} {path} is a folder, it must be a file")
    require_output_dir(flag, Path(path).parent)


def _refuse_name(flag: str, path: str | os.PathLike[str]) -> None:
    if not os.fspath(path):
        raise ValueError(f"{flag} is empty")
    if "\0" in os.fspath(path):
        raise ValueError(f"{flag} {path!r} cannot be written: it has a null character")


def _nearest_existing(path: Path) -> Path:
    for place in (path, *path.parents, Path()):
        if place.exists():
            return place
        if place.is_symlink():
            raise FileNotFoundError(errno.ENOENT, f"{place} is a link to nothing")
    raise AssertionError("the current folder does not exist")


# --- writing ---------------------------------------------------------------------------------------------------------


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """An OSError inside becomes an `OutputError` that names `path`: the system does not say which file was full."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise _output_error(path, error) from error


def write_atomic(path: Path, write: Callable[[IO[bytes]], Any], is_durable: bool = True) -> None:
    """The file is there in full, with its new content, or as it was; its folder is made.

    is_durable: it has reached the disk, too. Raises OutputError naming the file, and leaves no part of it behind.
    """
    temporary = path.with_name(path.name + UNFINISHED)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                _write_noting_errors(file, write)
                file.flush()
                if is_durable:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if is_durable:
            _sync_folder(path.parent)  # the rename itself must reach the disk too


def write_text_atomic(path: Path, text: str) -> None:
    write_atomic(path, lambda file: file.write(text.encode("utf-8")), is_durable=False)


def remove_unfinished(*folders: Path) -> None:
    """Removes what a killed program was writing by `write_atomic`, directly in these folders."""
    for folder in folders:
        for path in folder.glob("*" + UNFINISHED):
            path.unlink(missing_ok=True)


class _NotingFile:
    """Passes everything on and keeps the first error of a write: PyTorch's writer replaces it by one of its own."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def _write_noting_errors(file: IO[bytes], write: Callable[[IO[bytes]], Any]) -> None:
    noting: Any = _NotingFile(file)
    try:
        write(noting)
    except Exception as error:
        if noting.error is None:
            raise
        raise noting.error from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _output_error(path: str | os.PathLike[str], error: OSError) -> OutputError:
    named = OutputError(f"{path} cannot be written: {error.strerror or error}")
    named.errno = error.errno
    return named


# --- one program at a time -------------------------------------------------------------------------------------------


@contextmanager
def held_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """While inside, no other program can enter this with the same folder, which is made.

    The lock belongs to the process: it ends with it, however it ends, and worker processes do not inherit it. A folder
    that was made here and is still empty is removed again.
    Raises ValueError naming the folder and the process that holds it, OutputError where the lock cannot be written.
    """
    path = Path(folder) / LOCK_NAME
    made = [each for each in (path.parent, *path.parent.parents) if not each.exists()]
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _take_lock(path)
    try:
        yield
    finally:
        with suppress(OSError):  # a folder that is gone or closed now: what ended the run has said so
            path.unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):  # there is something in it now
            for each in made:
                each.rmdir()


def _take_lock(path: Path) -> int:
    """The descriptor that holds the lock. A file that its owner removed meanwhile does not count."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 200).decode("utf-8", "replace")
            if error.errno in _NO_LOCKS:
                logger.warning("%s: this file system has no locks, a second program there would not be noticed", path)
            else:
                os.close(descriptor)
                message = f"{path.parent} is in use by {holder or 'another process'}: end that one first"
                raise ValueError(f"{message}, or choose another folder") from error
        try:
            is_current = os.path.samestat(os.fstat(descriptor), os.stat(path))
        except FileNotFoundError:
            is_current = False
        if is_current:
            os.truncate(descriptor, 0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} (since {since})".encode(), 0)
            return descriptor
        os.close(descriptor)
