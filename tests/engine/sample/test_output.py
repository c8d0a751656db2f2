"""A folder of samples is one run's, whatever moment the program dies at, and what others put there stays."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from engine.sample import output
from engine.sample.output import GRID_NAME, LIST_NAME, MADE_WITH, picture_name, replacing, require_free
from util.images import save_png


class Killed(BaseException):
    """As SIGKILL: nothing of the program runs after it but what the test does."""


def write_run(folder: Path, count: int, shade: int) -> None:
    """What a run of `count` pictures writes, all of one shade."""
    for name in [*map(picture_name, range(count)), GRID_NAME]:
        save_png(np.full((2, 2, 3), shade, dtype=np.uint8), folder / name, {MADE_WITH: "{}"})
    images = [{"file": picture_name(index), "shade": shade} for index in range(count)]
    (folder / LIST_NAME).write_text(json.dumps({"images": images}))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def run(folder: Path, count: int, shade: int) -> None:
    with replacing(folder) as place:
        write_run(place, count, shade)


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A folder with a run of five pictures, and files of the user's own."""
    folder = tmp_path / "out"
    run(folder, 5, 50)
    (folder / "notes.txt").write_text("mine")
    save_png(np.zeros((2, 2, 3), dtype=np.uint8), folder / "9999.png")
    return folder


def test_a_smaller_run_leaves_no_picture_of_the_earlier_one(earlier: Path) -> None:
    run(earlier, 2, 90)
    names = set(content(earlier))
    assert names == {"0000.png", "0001.png", GRID_NAME, LIST_NAME, "notes.txt", "9999.png"}
    assert sorted(path.name for path in earlier.iterdir() if path.is_dir()) == []


def test_a_run_that_fails_leaves_the_earlier_one_whole(earlier: Path) -> None:
    before = content(earlier)

    def fails(error: type[BaseException]) -> None:
        with replacing(earlier) as place:
            save_png(np.zeros((2, 2, 3), dtype=np.uint8), place / picture_name(0))
            raise error

    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error):
            fails(error)
        assert content(earlier) == before and not any(path.is_dir() for path in earlier.iterdir())


@pytest.mark.parametrize("moment", range(8))
def test_killed_while_files_move_the_next_run_knows_what_is_whose(
    earlier: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Two, the grid and the list are moved, then three are removed: the process dies before each of these steps."""
    steps = iter(range(100))

    def dying(step: object) -> object:
        def call(*arguments: object, **options: object) -> None:
            if next(steps) == moment:
                raise Killed
            step(*arguments, **options)  # type: ignore[operator]

        return call

    with monkeypatch.context() as patch:
        patch.setattr(output.os, "replace", dying(os.replace))
        patch.setattr(output.Path, "unlink", dying(Path.unlink))
        with contextlib.suppress(Killed):
            run(earlier, 2, 90)
    run(earlier, 1, 120)
    assert set(content(earlier)) == {"0000.png", GRID_NAME, LIST_NAME, "notes.txt", "9999.png"}
    assert json.loads((earlier / LIST_NAME).read_text())["images"] == [{"file": "0000.png", "shade": 120}]


def test_a_picture_of_others_is_never_replaced(tmp_path: Path, earlier: Path) -> None:
    require_free(earlier, 5)
    require_free(tmp_path / "absent", 5)
    with pytest.raises(ValueError, match="9999.png is in the way and was not written by scripts.sample"):
        require_free(earlier, 10_000)
    (tmp_path / "other").mkdir()
    for name in (LIST_NAME, GRID_NAME, "0003.png"):
        (tmp_path / "other" / name).write_text("{}")
        with pytest.raises(ValueError, match=f"{name} is in the way"):
            require_free(tmp_path / "other", 4)
        (tmp_path / "other" / name).unlink()


def test_pictures_of_a_run_without_a_list_are_this_programs(tmp_path: Path) -> None:
    """As versions before this one left them when they were killed."""
    write_run(tmp_path, 3, 10)
    (tmp_path / LIST_NAME).unlink()
    require_free(tmp_path, 3)
    run(tmp_path, 1, 20)
    assert set(content(tmp_path)) == {"0000.png", GRID_NAME, LIST_NAME}
