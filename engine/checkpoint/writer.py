"""How a run's checkpoint gets onto the disk: by all processes together, or by the one that is left."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoint.identity import Identity
from engine.checkpoint.kept import kept_path, link_last
from engine.checkpoint.resume import checkpoint_content
from engine.train.state import Position, TrainState
from util.checkpoint import save_atomic
from util.distributed import DistInfo, failing_together, gather_objects
from util.names import LAST_NAME

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointWriter:
    """Writes checkpoint-last.pth, atomically, on rank 0. args: every flag by name. open_interval: a process's part of
    the next log line. extra: what this stage keeps besides. keep_every: the file of every so many steps stays, under
    its step's name; 0: none."""

    state: TrainState
    output_dir: Path
    stage: str
    identity: Identity
    args: dict[str, Any]
    global_batch: int
    dist: DistInfo
    open_interval: Callable[[], dict[str, Any]]
    extra: Callable[[], dict[str, Any]] = dict
    keep_every: int = 0

    def save(self, position: Position) -> None:
        """Every process calls it, and all fail if the file cannot be written."""
        content = self.content(position) | {"open_interval": gather_objects(self.open_interval())}
        with failing_together():
            self.write(content, position)

    def save_alone(self, position: Position) -> None:
        """For rank 0 when the others are gone: without their parts of the next log line."""
        self.write(self.content(position), position)

    def content(self, position: Position) -> dict[str, Any]:
        return (
            checkpoint_content(self.state, position, self.stage, self.identity, self.args, self.global_batch)
            | self.extra()
        )

    def write(self, content: dict[str, Any], position: Position) -> None:
        if self.dist.is_main:
            write_checkpoint(content, position, self.output_dir, self.keep_every)


def write_checkpoint(content: dict[str, Any], position: Position, folder: Path, keep_every: int) -> None:
    """Writes the folder's checkpoint-last.pth, and leaves the file where this step's is to stay."""
    is_kept = keep_every > 0 and position.step % keep_every == 0
    path = kept_path(folder, position.step) if is_kept else folder / LAST_NAME
    save_atomic(content, path)
    if is_kept:  # killed before, the run writes the same file again
        link_last(path)
    logger.info("saved %s at epoch %d, step %d", path, position.epoch, position.step)
