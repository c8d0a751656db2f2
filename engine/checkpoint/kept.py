"""The checkpoints of a run folder, and which one to go back to.

checkpoint-last.pth            continued by the same command
checkpoint-<step>.pth          --keep_every: stays; the bytes that checkpoint-last.pth had at that step
checkpoint-best.safetensors    --keep_best: the averaged weights alone, with the score in the metadata
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from util.checkpoint import safetensors_metadata
from util.names import BEST_NAME, LAST_NAME
from util.output import UNFINISHED, writing

_KEPT = re.compile(r"checkpoint-(\d+)\.pth")


def kept_path(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step:07d}.pth"


def kept_checkpoints(folder: Path) -> dict[int, Path]:
    """By step, the newest first."""
    found = {int(match[1]): path for path in folder.glob("checkpoint-*.pth") if (match := _KEPT.fullmatch(path.name))}
    return dict(sorted(found.items(), reverse=True))


def link_last(kept: Path) -> None:
    """checkpoint-last.pth becomes `kept`, atomically: a hard link to it, or a copy where there are no links."""
    last = kept.with_name(LAST_NAME)
    temporary = last.with_name(last.name + UNFINISHED)
    with writing(last):
        temporary.unlink(missing_ok=True)
        try:
            os.link(kept, temporary)
        except OSError:
            shutil.copyfile(kept, temporary)
        os.replace(temporary, last)


def way_back(damaged: Path, read: Callable[[Path], Any]) -> str:
    """What to say after a checkpoint's error: the newest other one in its folder that `read` accepts; "" for files that
    are no checkpoint of a run folder."""
    if damaged.name != LAST_NAME and not _KEPT.fullmatch(damaged.name):
        return ""
    for path in kept_checkpoints(damaged.parent).values():
        if path != damaged and _is_whole(path, read):
            return f"; the newest whole checkpoint there is {path}: copy it to {LAST_NAME} to go on from it"
    best = damaged.with_name(BEST_NAME)
    if _is_whole(best, read):
        return f"; no other whole checkpoint is there but {best}: weights to start from (--resume)"
    return "; no other whole checkpoint is there (--keep_every keeps some)"


def where_to_go_back(folder: Path, step: int) -> str:
    """The file to go back to for the weights of `step`, in words: its own, or that of the last step kept before; else
    the flags that would have kept one."""
    best = folder / BEST_NAME
    for kept, path in kept_checkpoints(folder).items():
        if kept == step or (kept < step and _step_of(best) != step):
            return f"{path} is of step {kept}: copied to {LAST_NAME}, it is continued"
    if _step_of(best) == step:
        return f"{best} holds its weights: --resume it in another --output_dir"
    return "no checkpoint of it is there, --keep_every or --keep_best eval/AP50 would have kept one"


def _step_of(best: Path) -> int | None:
    return int(safetensors_metadata(best).get("step", -1)) if best.is_file() else None


def _is_whole(path: Path, read: Callable[[Path], Any]) -> bool:
    try:
        read(path)
    except (ValueError, OSError):
        return False
    return True
