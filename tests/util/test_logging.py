"""Who speaks, what is written, and that a resumed run's metrics read as if it had never stopped."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from util.logging import MetricWriter, progress, read_metrics, setup_logging, truncate_after


@pytest.fixture(autouse=True)
def _root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in [each for each in root.handlers if each not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    logging.captureWarnings(False)


def test_rank_0_speaks_and_keeps_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(tmp_path / "run")
    setup_logging(tmp_path / "run")  # again: still one line each
    logging.getLogger("engine.train.loop").info("epoch 1")
    logging.getLogger("engine.train.loop").debug("hidden")
    assert capsys.readouterr().err.count("epoch 1") == 1
    assert (tmp_path / "run" / "log.txt").read_text().count("epoch 1") == 1
    assert "hidden" not in (tmp_path / "run" / "log.txt").read_text()


def test_other_ranks_only_warn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(tmp_path, rank=3)
    logging.getLogger("x").info("quiet")
    logging.getLogger("x").warning("careful")
    captured = capsys.readouterr()
    assert "quiet" not in captured.err and "[rank 3] careful" in captured.err and captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_handlers_of_others_stay() -> None:
    other = logging.NullHandler()
    logging.getLogger().addHandler(other)
    setup_logging()
    assert other in logging.getLogger().handlers


def test_a_log_line_does_not_break_a_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    setup_logging()
    with progress(total=3, desc="steps") as bar:
        bar.update()
        logging.getLogger("x").info("a line")
    line = next(part for part in stream.getvalue().replace("\r", "\n").split("\n") if "a line" in part)
    assert "steps" not in line


def test_progress_counts_on_rank_0_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress([1, 2], desc="seen")) == [1, 2]
    assert "2/2" in capsys.readouterr().err
    assert list(progress([1, 2], rank=1)) == [1, 2]
    assert capsys.readouterr().err == ""


def test_metrics_lines_and_board(tmp_path: Path) -> None:
    picture = np.zeros((4, 6, 3), np.uint8)
    with MetricWriter(tmp_path) as writer:
        writer.scalars(1, {"loss": 0.5, "epoch": 0})
        writer.scalars(2, {"loss": float("nan"), "lr": np.float32(0.25)})  # type: ignore[dict-item]
        writer.image(2, "samples", picture)
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2  # flushed line by line
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 0.5, "epoch": 0},
        {"step": 2, "loss": None, "lr": 0.25},
    ]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(1, 0.5)]
    assert (board.Images("samples")[0].width, board.Images("samples")[0].height) == (6, 4)


@pytest.mark.parametrize("image", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((3, 4, 4), np.uint8)])
def test_images_are_checked(tmp_path: Path, image: np.ndarray) -> None:
    with MetricWriter(None) as writer, pytest.raises(ValueError, match=r"samples must be uint8 \[H, W, 3\]"):
        writer.image(1, "samples", image)


def test_resumed_run_takes_back_later_lines(tmp_path: Path) -> None:
    with MetricWriter(tmp_path) as writer:
        for step in (1, 2, 3, 4):
            writer.scalars(step, {"loss": float(step)})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')  # cut short by a crash
    with MetricWriter(tmp_path, resume_step=2) as writer:
        writer.scalars(3, {"loss": 30.0})
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1), (2, 2), (3, 30)]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 30)]


def test_a_new_run_starts_a_new_file(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        with MetricWriter(tmp_path) as writer:
            writer.scalars(1, {"loss": value})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


def test_other_ranks_and_no_folder_write_nothing(tmp_path: Path) -> None:
    for writer in (MetricWriter(tmp_path / "x", rank=1), MetricWriter(None)):
        writer.scalars(1, {"loss": 1.0})
        writer.image(1, "samples", np.zeros((2, 2, 3), np.uint8))
        writer.close()
    assert list(tmp_path.iterdir()) == []


def test_truncating_nothing(tmp_path: Path) -> None:
    truncate_after(tmp_path / "none.jsonl", 3)
    (tmp_path / "m.jsonl").write_text('{"step": 3}\n')
    truncate_after(tmp_path / "m.jsonl", 3)
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 3}\n'
