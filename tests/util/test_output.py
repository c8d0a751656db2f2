"""Output places: found wrong before any work, written whole or not at all, one program at a time."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from tests.helpers.runs import FORK, in_child
from util.checkpoint import save_atomic
from util.output import (
    LOCK_NAME,
    OutputError,
    held_folder,
    remove_unfinished,
    require_output_dir,
    require_output_file,
    write_atomic,
)

# --- before any work -------------------------------------------------------------------------------------------------


def test_places_that_can_be_written_stay_as_they_are(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "new", tmp_path / "a" / "b" / "c"):
        require_output_dir("--output_dir", place)
        require_output_file("--output", place / "x.bin")
    assert list(tmp_path.iterdir()) == []


def a_file(root: Path) -> Path:
    (root / "file").write_text("x")
    return root / "file"


def below_a_file(root: Path) -> Path:
    return a_file(root) / "run" / "deeper"


def a_broken_link(root: Path) -> Path:
    (root / "link").symlink_to(root / "nowhere")
    return root / "link"


def a_loop(root: Path) -> Path:
    (root / "loop").symlink_to(root / "loop")
    return root / "loop"


def too_long(root: Path) -> Path:
    return root / ("x" * 300)


def read_only_file_system(_root: Path) -> Path:
    return Path("/proc/run")


def with_a_null(root: Path) -> Path:
    return root / "a\0b"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (a_file, "is a file, it must be a folder"),
        (below_a_file, "cannot be made: .*file is a file"),
        (a_broken_link, "is a link to nothing"),
        (a_loop, "cannot be written: "),
        (too_long, "cannot be written: File name too long"),
        (read_only_file_system, "cannot be written: "),
        (with_a_null, "cannot be written: "),
    ],
)
def test_places_that_cannot_be_written_are_refused_by_name(
    tmp_path: Path, make: Callable[[Path], Path], reason: str
) -> None:
    place = make(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=f"^--output_dir .*{reason}") as caught:
        require_output_dir("--output_dir", place)
    assert place.name.split("\0")[0] in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(ValueError, match="^--output "):
        require_output_file("--output", place / "x.bin")


def test_a_folder_without_permission(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    tmp_path.chmod(0o755)

    def asks() -> int:
        if os.getuid() == 0:  # root may write anywhere
            os.setgroups([])
            os.setuid(12345)
        try:
            require_output_dir("--output_dir", closed / "run")
        except ValueError as error:
            return 0 if "Permission denied" in str(error) else 2
        return 1

    for folder in (tmp_path, *tmp_path.parents):
        if not os.stat(folder).st_mode & 0o001:
            pytest.skip(f"{folder} is closed to others")
    assert in_child(asks) == 0


def test_empty_names_and_a_folder_where_a_file_belongs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--output_dir is empty"):
        require_output_dir("--output_dir", "")
    with pytest.raises(ValueError, match="--output is empty"):
        require_output_file("--output", "")
    with pytest.raises(ValueError, match="is a folder, it must be a file"):
        require_output_file("--output", tmp_path)


# --- writing ---------------------------------------------------------------------------------------------------------


def write_bytes(path: Path, size: int) -> None:
    write_atomic(path, lambda file: file.write(b"x" * size))


def write_checkpoint(path: Path, size: int) -> None:
    save_atomic({"x": torch.zeros(size // 4)}, path)


@pytest.mark.parametrize("write", [write_bytes, write_checkpoint])
def test_a_write_that_does_not_fit_names_file_and_reason_and_leaves_the_old_file(
    tmp_path: Path, write: Callable[[Path, int], None]
) -> None:
    path = tmp_path / "file.pth"
    write(path, 1000)
    before = path.read_bytes()

    def too_large() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            write(path, 100_000)
        except OutputError as error:
            is_right = str(error) == f"{path} cannot be written: File too large" and error.errno == errno.EFBIG
            return 0 if is_right else 2
        return 1

    assert in_child(too_large) == 0
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["file.pth"]


def test_another_error_while_writing_stays_what_it_is(tmp_path: Path) -> None:
    def broken(_file: IO[bytes]) -> Any:
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        write_atomic(tmp_path / "x", broken)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_program_was_writing_is_removed(tmp_path: Path) -> None:
    for name in ("x.png.tmp", "x.png", "notes.txt"):
        (tmp_path / name).write_text("x")
    remove_unfinished(tmp_path, tmp_path / "none")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["notes.txt", "x.png"]


# --- one program at a time -------------------------------------------------------------------------------------------


def test_the_second_program_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (tmp_path / "link").symlink_to(folder)

    def enters() -> int:
        try:
            with held_folder(tmp_path / "link"):
                return 0
        except ValueError as error:
            is_named = f"{tmp_path / 'link'} is in use by process {os.getppid()} on " in str(error)
            return 3 if is_named and "\n" not in str(error) else 4

    with held_folder(folder):
        assert in_child(enters) == 3
        assert in_child(enters) == 3  # a refused one frees nothing
        (folder / "file").write_text("x")
    assert [each.name for each in folder.iterdir()] == ["file"]
    assert in_child(enters) == 0


def test_a_killed_program_holds_nothing_though_its_workers_live(tmp_path: Path) -> None:
    ready = FORK.Event()

    def holds() -> None:
        with held_folder(tmp_path / "run"):
            if os.fork() == 0:  # a worker, which lives on
                signal.alarm(20)
                signal.pause()
            ready.set()
            signal.pause()

    child = FORK.Process(target=holds)
    child.start()
    assert ready.wait(20) and child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert (tmp_path / "run" / LOCK_NAME).is_file()
    with held_folder(tmp_path / "run"):
        pass
    assert list((tmp_path / "run").iterdir()) == []


def test_folders_that_were_made_and_stayed_empty_are_removed(tmp_path: Path) -> None:
    with pytest.raises(KeyError), held_folder(tmp_path / "a" / "b"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with held_folder(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()


def test_one_of_many_that_start_at_once_gets_the_folder(tmp_path: Path) -> None:
    """Eight processes, twenty rounds: never two inside."""
    inside = FORK.Value("i", 0)
    most = FORK.Value("i", 0)
    entered = FORK.Value("i", 0)

    def tries() -> int:
        for _ in range(20):
            try:
                with held_folder(tmp_path / "run"):
                    with inside.get_lock():
                        inside.value += 1
                        most.value = max(most.value, inside.value)
                        entered.value += 1
                    with inside.get_lock():
                        inside.value -= 1
            except (ValueError, OutputError):
                pass
        return 0

    children = [FORK.Process(target=tries) for _ in range(8)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert most.value == 1 and entered.value >= 1
