"""Logs, metrics and progress bars. Rank 0 speaks; other ranks only warn.

metrics.jsonl   one JSON object a line, {"step": 120, "loss": 0.31, ...}; null where a value is not finite
tensorboard/    the same scalars, and images
log.txt         what the console showed
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from tqdm import tqdm

logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"
_HANDLER_NAME = "structmar"


class _TqdmHandler(logging.StreamHandler[Any]):
    """Writes above a running progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:  # noqa: BLE001 - as logging's own handlers: report and go on
            self.handleError(record)


def setup_logging(output_dir: str | os.PathLike[str] | None = None, rank: int = 0) -> None:
    """Sets the root logger up: rank 0 at INFO to stderr and, given a folder, to its log.txt; other ranks at WARNING.

    Calling it again replaces what the last call set up; handlers of others stay.
    """
    level = logging.INFO if rank == 0 else logging.WARNING
    prefix = "%(asctime)s %(levelname).1s " + (f"[rank {rank}] " if rank else "")
    handlers: list[logging.Handler] = [_TqdmHandler()]
    if output_dir is not None and rank == 0:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(Path(output_dir) / "log.txt", encoding="utf-8"))
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if handler.get_name() == _HANDLER_NAME]:
        root.removeHandler(old)
        old.close()
    for handler in handlers:
        handler.set_name(_HANDLER_NAME)
        handler.setFormatter(logging.Formatter(prefix + "%(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
        root.addHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(True)


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


class MetricWriter:
    """Scalars and images of a run, on rank 0; on other ranks, or without a folder, every call does nothing.

    A run that continues at `resume_step` takes back what was written for later steps (those will be written again),
    and a line cut short by a crash. A new run continues at 0.
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
        folder.mkdir(parents=True, exist_ok=True)
        truncate_after(folder / METRICS_NAME, resume_step)
        self._file = open(folder / METRICS_NAME, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._board = SummaryWriter(str(board_dir or folder / "tensorboard"), purge_step=resume_step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics. Values that are not finite become null (and are left out of TensorBoard)."""
        if not self._is_active:
            return
        plain = {name: _json_number(value) for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **plain}, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in plain.items():
            if value is not None:
                self._board.add_scalar(name, value, step)

    def image(self, step: int, tag: str, image: np.ndarray) -> None:
        """image: uint8 [H, W, 3]."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"image {tag} must be uint8 [H, W, 3], got {image.dtype} {image.shape}")
        if self._is_active:
            self._board.add_image(tag, image, step, dataformats="HWC")

    def close(self) -> None:
        if self._is_active:
            self._file.close()
            self._board.close()
            self._is_active = False

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def truncate_after(path: str | os.PathLike[str], step: int) -> None:
    """Drops lines of a metrics file with a later step, and lines that are not whole. Atomic; no file is fine."""
    path = Path(path)
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if _is_until(line, step)]
    if len(kept) == len(lines):
        return
    logger.info(f"{path}: dropped {len(lines) - len(kept)} of {len(lines)} lines, written after step {step}")
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


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
