"""Run folders after accidents: a kill at any moment, a second run, a disk without room, a place that is closed.

The law of the kills: the same command again, and every file equals that of a run without a kill, but for the log,
TensorBoard and measured speeds.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import main_mar
from tests.helpers.runs import in_child
from tests.helpers.tiny_run import argv, write_world
from util.logging import MetricWriter
from util.output import held_folder

NOT_COMPARED = ("log.txt", "environment.json", "tensorboard")
STEPS = {"epochs": 2, "max_steps": 7, "save_freq_steps": 2, "sample_freq": 2, "log_freq": 3, "num_preview": 1}
QUICK = {"num_iter": 1, "num_sampling_steps": 2, "warmup_epochs": 0}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("folders"))


def run_main(main: Callable[[list[str]], Any], words: list[str]) -> int:
    """The exit status, as a shell would see it."""
    try:
        return int(main(words) or 0)
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(end.code + "\n")
            return 1
        return int(end.code or 0)


def train(world: Path, output: str, **flags: Any) -> int:
    return run_main(main_mar.main, argv(world, output, **(STEPS | QUICK | flags)))


def contents(folder: Path) -> dict[str, Any]:
    """Everything that must be equal, by name."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith(NOT_COMPARED):
            found[name] = path.read_bytes()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found["metrics.jsonl"] = [{key: line[key] for key in line if key != "images_per_second"} for line in lines]
    return found


def assert_equal_contents(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name] == wanted[name], name


# --- kills -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(world: Path) -> dict[str, Any]:
    assert in_child(lambda: train(world, "run")) == 0
    return contents(world / "run")


@pytest.fixture
def no_run(world: Path, undisturbed: dict[str, Any]) -> None:
    """The folder's name is in its files: all runs that are compared have the same."""
    shutil.rmtree(world / "run")


def kill_at_rename(number: int) -> None:
    """Dies between writing a file and giving it its name."""
    rename, seen = os.replace, []

    def replace(source: Any, target: Any) -> None:
        seen.append(target)
        if len(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.replace = replace


def kill_after_metrics(number: int) -> None:
    """Dies with a line of metrics written that no checkpoint knows of."""
    write, seen = MetricWriter.scalars, []

    def scalars(self: MetricWriter, *args: Any, **named: Any) -> None:
        write(self, *args, **named)
        seen.append(1)
        if len(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    MetricWriter.scalars = scalars  # type: ignore[method-assign]


@pytest.mark.usefixtures("no_run")
@pytest.mark.parametrize(
    ("kill", "number"),
    [
        (kill_at_rename, 4),
        (kill_at_rename, 6),
        (kill_after_metrics, 1),
        *(pytest.param(kill_at_rename, number, marks=pytest.mark.slow) for number in (1, 2, 3, 5, 7, 8, 9, 10)),
    ],
)
def test_a_killed_run_goes_on_to_the_same_folder(
    world: Path, undisturbed: dict[str, Any], kill: Callable[[int], None], number: int
) -> None:
    def is_killed() -> int:
        kill(number)
        return train(world, "run")

    assert in_child(is_killed) == -signal.SIGKILL
    assert in_child(lambda: train(world, "run")) == 0
    assert_equal_contents(contents(world / "run"), undisturbed)


# --- a second run ----------------------------------------------------------------------------------------------------


def test_a_folder_that_is_in_use_is_refused_by_name(world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with held_folder(world / "held"):
        assert in_child(lambda: train(world, "held")) == 1
        said = capfd.readouterr().err
        assert f"main_mar.py: error: {world / 'held'} is in use by process {os.getpid()} on " in said
        assert "Traceback" not in said
    assert not (world / "held").exists()


# --- no room, no way -------------------------------------------------------------------------------------------------


def error_line(said: str) -> str:
    """The one line that says why."""
    assert "Traceback" not in said and "Logging error" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("main_mar.py: error: ")]
    return line


@pytest.mark.parametrize(
    ("sample_freq", "name"),
    [(2, "samples/step-0000002.png"), (0, "checkpoint-last.pth")],
    ids=["preview", "checkpoint"],
)
def test_a_file_that_does_not_fit_ends_the_run_in_one_line(
    world: Path, sample_freq: int, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = world / f"full-{sample_freq}"

    def too_small() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        return train(world, folder.name, sample_freq=sample_freq)

    assert in_child(too_small) == 1
    assert error_line(capfd.readouterr().err).endswith(f"{folder / name} cannot be written: File too large")
    assert [path.name for path in folder.rglob("*.tmp")] == []
    assert in_child(lambda: train(world, folder.name, sample_freq=sample_freq)) == 0


def test_a_log_without_room_ends_the_run_in_one_line(world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (world / "no-log").mkdir()
    (world / "no-log" / "log.txt").symlink_to("/dev/full")
    assert in_child(lambda: train(world, "no-log")) == 1
    line = error_line(capfd.readouterr().err)
    assert line.endswith(f"{world / 'no-log' / 'log.txt'} cannot be written: No space left on device")


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [4, 16, 64, 256, 1024, 4 * 1024, 13 * 1024, 30 * 1024])
def test_a_disk_of_any_size_ends_in_one_line_and_goes_on_with_room(
    world: Path, kilobytes: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Needs the right to mount: whatever the first file is that does not fit."""
    folder = world / f"disk-{kilobytes}"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a file system")
    try:
        status, said = in_child(lambda: train(world, folder.name)), capfd.readouterr().err
        if status:
            assert status == 1 and "No space left on device" in error_line(said)
        assert [path.name for path in folder.rglob("*.tmp")] == []
        subprocess.run(["mount", "-o", "remount,size=1g", str(folder)], check=True)
        assert in_child(lambda: train(world, folder.name)) == 0
        assert len(contents(folder)["metrics.jsonl"]) == 3
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("part", ["samples", "tensorboard", "metrics.jsonl"])
def test_a_place_that_closes_ends_the_run_with_the_last_whole_step(
    world: Path, part: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Another program has put a file, or a folder, where this one writes."""
    output = f"closed-{part}"
    place = world / output / part
    if part == "metrics.jsonl":
        place.mkdir(parents=True)
    else:
        place.parent.mkdir()
        place.write_text("in the way")
    assert in_child(lambda: train(world, output)) == 1
    line = error_line(capfd.readouterr().err)
    assert str(place) in line and "cannot be written" in line
    assert (world / output / "checkpoint-last.pth").is_file() == (part == "samples")
    assert line in (world / output / "log.txt").read_text()  # it is the whole console
    if part == "samples":
        assert "starting stage" in (world / output / "log.txt").read_text()


def test_debug_shows_where(world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (world / "with-debug").mkdir()
    (world / "with-debug" / "samples").write_text("in the way")
    assert in_child(lambda: train(world, "with-debug", debug=True)) == 1
    assert "Traceback (most recent call last)" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("no_run")
def test_the_clock_does_not_matter(world: Path, undisturbed: dict[str, Any]) -> None:
    def backwards() -> int:
        real, start = time.time, time.time()
        time.time = lambda: start - (real() - start)
        return train(world, "run")

    assert in_child(backwards) == 0
    assert_equal_contents(contents(world / "run"), undisturbed)
