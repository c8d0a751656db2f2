"""Logs, metrics and progress bars. Rank 0 speaks; other ranks only warn.

metrics.jsonl   one JSON object a line, {"step": 120, "loss": 0.31, ...}; null where a value is not finite
tensorboard/    the same scalars in groups (`board_tag`), memory, and images
log.txt         what the console showed, from the first line on
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from tqdm import tqdm

from util.names import METRICS_NAME
from util.output import OutputError, write_text_atomic, writing

logger = logging.getLogger(__name__)

LOG_NAME = "log.txt"
_HANDLER_NAME = "structmar"
_MAX_KEPT = 1000  # lines before a run folder is open; scripts without one never write them
_BOARD_GROUPS = {
    "speed": ("images_per_second", "rollout_seconds", "update_seconds"),
    "train": ("loss", "grad_norm", "lr", "epoch"),
    "reward": ("reward", "reward_std", "group_std", "zero_std_share"),
}


def board_tag(name: str) -> str:
    """TensorBoard's name of a metric: in the group of its kind. Names with a group keep it, others are stage 3's."""
    if "/" in name:
        return name
    group = next((group for group, names in _BOARD_GROUPS.items() if name in names), "rl")
    return f"{group}/{name}"


# --- log -------------------------------------------------------------------------------------------------------------


class _TqdmHandler(logging.StreamHandler[Any]):
    """Writes above a running progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:  # noqa: BLE001 - as logging's own handlers: report and go on
            self.handleError(record)


class _Kept(logging.Handler):
    """Keeps the lines that come before there is a run folder."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: deque[str] = deque(maxlen=_MAX_KEPT)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


class _LogFile(logging.FileHandler):
    """log.txt. A write that fails raises OutputError where the line was logged, as every other write does."""

    def __init__(self, path: Path) -> None:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            super().__init__(path, encoding="utf-8", errors="backslashreplace")

    def write_line(self, line: str) -> None:
        assert self.stream is not None, "opened by the constructor"
        with writing(self.baseFilename):
            self.stream.write(line + self.terminator)
            self.stream.flush()

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            raise OutputError(f"{self.baseFilename} cannot be written: {error.strerror or error}") from error
        super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):  # what is left in its buffer of a line that could not be written
            super().close()


def setup_logging(output_dir: str | os.PathLike[str] | None = None, rank: int = 0) -> None:
    """Sets the root logger up: rank 0 at INFO to stderr and, given a folder, to its log.txt; other ranks at WARNING.

    Calling it again replaces what the last call set up; handlers of others stay. Lines that were logged after an
    earlier call without a folder are written into log.txt first. Raises OutputError naming log.txt.
    """
    level = logging.INFO if rank == 0 else logging.WARNING
    prefix = "%(asctime)s %(levelname).1s " + (f"[rank {rank}] " if rank else "")
    root = logging.getLogger()
    previous = [handler for handler in root.handlers if handler.get_name() == _HANDLER_NAME]
    handlers: list[logging.Handler] = [_TqdmHandler()]
    if rank == 0 and output_dir is None:
        handlers.append(_Kept())
    if rank == 0 and output_dir is not None:
        log_file = _LogFile(Path(output_dir) / LOG_NAME)
        handlers.append(log_file)
        for line in [line for handler in previous if isinstance(handler, _Kept) for line in handler.lines]:
            log_file.write_line(line)
    for old in previous:
        root.removeHandler(old)
        old.close()
    for handler in handlers:
        handler.set_name(_HANDLER_NAME)
        handler.setFormatter(logging.Formatter(prefix + "%(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
        root.addHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(True)


def note_in_log(line: str) -> None:
    """Into log.txt alone, if there is one that can be written: what the program prints itself when it ends."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _LogFile):
            with suppress(OSError):
                handler.write_line(line)


def progress(
    iterable: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    initial: int = 0,
    desc: str | None = None,
    unit: str = "it",
    rank: int = 0,
) -> tqdm[Any]:
    """A tqdm bar with rate and ETA on rank 0, none on other ranks. Where stderr is a file it reports twice a minute."""
    return tqdm(
        iterable,
        total=total,
        initial=initial,
        desc=desc,
        unit=unit,
        disable=rank != 0,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
        file=sys.stderr,
    )


# --- metrics ---------------------------------------------------------------------------------------------------------


class MetricWriter:
    """Scalars and images of a run, on rank 0; on other ranks, or without a folder, every call does nothing.

    A run that continues at `resume_step` takes back what was written for later steps (those will be written again),
    and a line cut short by a crash. A new run, at 0, starts a new file. A write that fails raises OutputError.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str] | None,
        rank: int = 0,
        resume_step: int = 0,
        board_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        """board_dir: where TensorBoard's events go; None: `tensorboard` in the output folder."""
        self._is_active = output_dir is not None and rank == 0
        if output_dir is None or not self._is_active:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import: only where it is used

        folder = Path(output_dir)
        self._path, self._board_dir = folder / METRICS_NAME, Path(board_dir or folder / "tensorboard")
        with writing(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            truncate_after(self._path, resume_step if resume_step > 0 else -1)  # a new run has an entry of step 0, too
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        threading.excepthook = _without_board_thread
        with writing(self._board_dir):
            self._board = SummaryWriter(str(self._board_dir), purge_step=resume_step + 1 if resume_step > 0 else 0)

    def scalars(self, step: int, values: Mapping[str, float], board_only: Mapping[str, float] | None = None) -> None:
        """One line of metrics, and the same in TensorBoard, with what only that shows. Values that are not finite
        become null (and are left out of TensorBoard)."""
        if not self._is_active:
            return
        plain = {name: _json_number(value) for name, value in values.items()}
        with writing(self._path):
            self._file.write(json.dumps({"step": step, **plain}, allow_nan=False) + "\n")
            self._file.flush()
        with writing(self._board_dir):
            for name, value in {**plain, **(board_only or {})}.items():
                if value is not None:
                    self._board.add_scalar(board_tag(name), value, step)

    def image(self, step: int, tag: str, image: np.ndarray) -> None:
        """image: uint8 [H, W, 3]."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"image {tag} must be uint8 [H, W, 3], got {image.dtype} {image.shape}")
        if self._is_active:
            with writing(self._board_dir):
                self._board.add_image(tag, image, step, dataformats="HWC")

    def close(self) -> None:
        if self._is_active:
            self._is_active = False
            with writing(self._path):
                self._file.close()
            with writing(self._board_dir):
                self._board.close()

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:  # the first error is the one to tell
            with suppress(OSError):
                self.close()


def _without_board_thread(ended: threading.ExceptHookArgs) -> None:
    """TensorBoard hands its thread's OSError on to the next call here: no need to print it as well."""
    is_told_later = type(ended.thread).__name__ == "_AsyncWriterThread" and isinstance(ended.exc_value, OSError)
    if not is_told_later:
        threading.__excepthook__(ended)


def truncate_after(path: str | os.PathLike[str], step: int) -> None:
    """Drops lines of a metrics file with a later step, and lines that are not whole. Atomic; no file is fine."""
    path = Path(path)
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if _is_until(line, step)]
    if len(kept) == len(lines):
        return
    logger.info(f"{path}: dropped {len(lines) - len(kept)} of {len(lines)} lines, written after step {max(step, 0)}")
    write_text_atomic(path, "".join(kept))


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, in order."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def _is_until(line: str, step: int) -> bool:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return False
    return line.endswith("\n") and isinstance(entry, dict) and entry.get("step", step + 1) <= step


def _json_number(value: float) -> int | float | None:
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else None
