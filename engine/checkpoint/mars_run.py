"""How a run of MARS starts and what its checkpoint holds. As with StructMAR (`resume.py`), the same stage's file is
continued, another one's weights are a start.

    format, mars (`MarsIdentity`), stage, model (all that trains, by name), model_ema ({} without an average),
    optimizer, epoch, step, images_in_epoch, batch_in_epoch, global_batch, args, open_interval

No weight of the frozen language model is in it. It is the same file under one process, DDP and FSDP.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from engine.checkpoint.kept import way_back
from engine.checkpoint.mars_weights import RUN_FORMAT, read_mars_file
from engine.checkpoint.resume import Source
from engine.checkpoint.writer import write_checkpoint
from engine.train.mars import MarsState
from engine.train.parallel import gathered
from engine.train.state import Position
from models.mars.identity import MarsIdentity, require_same_mars
from models.mars.model import Mars
from models.mars.stages import UPSCALE
from util.checkpoint import load_plain, resolve_checkpoint
from util.distributed import DistInfo, failing_together, gather_objects
from util.names import LAST_NAME, MARS_ENTRY

logger = logging.getLogger(__name__)

_NEEDED: dict[str, type] = {MARS_ENTRY: dict, "stage": str, "model": dict, "model_ema": dict, "optimizer": dict,
                            "epoch": int, "step": int, "images_in_epoch": int, "batch_in_epoch": int,
                            "global_batch": int, "args": dict, "open_interval": list}  # fmt: skip


def find_mars_source(output_dir: str | Path, resume: str, auto_resume: bool, stage: str) -> Source:
    """Decides where a run of `stage` starts and reads that file. Loads nothing into a model and writes nothing.

    Raises FileNotFoundError or ValueError naming the file if it is missing, unreadable or no run of MARS, or if the
    output folder holds another stage's checkpoint, which this run would overwrite.
    """
    own = Path(output_dir) / LAST_NAME
    if os.path.lexists(own) and auto_resume:
        state = read_mars_run(own)
        if state["stage"] != stage:
            raise ValueError(
                f"{own} was written by stage '{state['stage']}', this run is stage '{stage}' and would overwrite it: "
                f"choose another --output_dir (and pass --resume {own} to start from it)"
            )
        own_names = (own.resolve(), own.parent.resolve())
        if resume and resume != state["args"].get("resume") and Path(resume).resolve() not in own_names:
            logger.warning("--resume %s is not read: %s is continued; for the former choose another --output_dir, or "
                           "--no-auto_resume, which overwrites the latter", resume, own)  # fmt: skip
        return Source("continue", own, state)
    if not resume:
        return Source("scratch", None, {})
    path = resolve_checkpoint(resume)
    if path.suffix == ".safetensors":
        return Source("start", path, _exported(path))
    state = read_mars_run(path)
    return Source("continue" if state["stage"] == stage else "start", path, state)


def _exported(path: Path) -> dict[str, Any]:
    """What a start needs, of a file without the state of a run."""
    tensors, said = read_mars_file(path)
    entries = {MARS_ENTRY: said.identity.as_dict(), "stage": said.identity.stage, "step": said.step}
    return {**entries, "model": tensors, "model_ema": {}}


def read_mars_run(path: Path) -> dict[str, Any]:
    """A checkpoint of a run of MARS. Raises ValueError naming the file, what is wrong with it, and the newest whole one
    beside it."""
    try:
        return _read(path)
    except ValueError as error:
        raise ValueError(f"{error}{way_back(path, _read)}") from error


def _read(path: Path) -> dict[str, Any]:
    content = load_plain(path, mmap=True)
    if content.get("format") != RUN_FORMAT:
        raise ValueError(
            f"{path} is no checkpoint of --backbone mars: its format is {content.get('format')!r}, not {RUN_FORMAT!r}"
        )
    for name, kind in _NEEDED.items():
        if type(content.get(name)) is not kind:
            raise ValueError(f"{path}: {name} must be a {kind.__name__}, got {type(content.get(name)).__name__}")
    if content["global_batch"] < 1 or min(content[name] for name in ("epoch", "step", "images_in_epoch")) < 0:
        raise ValueError(f"{path}: epoch, step, images_in_epoch and global_batch must not be negative")
    return content


def check_mars_identity(source: Source, wanted: MarsIdentity) -> None:
    """Raises ValueError naming the file, the field and both values if its weights were made for something else. A run
    that starts may cut captions elsewhere; one that makes pictures larger starts from weights that draw them small."""
    if source.kind == "scratch":
        return
    found = MarsIdentity.of(source.state[MARS_ENTRY], f"{source.path}: {MARS_ENTRY}")
    if found.stage == UPSCALE and wanted.stage != UPSCALE:
        makes = f"is of stage {UPSCALE}, which makes pictures larger"
        raise ValueError(f"{source.path} {makes}: stage {wanted.stage} starts from weights that draw")
    may_differ = ("stage", "max_tokens") if source.kind == "start" else ("stage",)
    wanted = wanted if found.stage == UPSCALE else wanted.before
    require_same_mars(found, wanted, str(source.path), may_differ)


def load_mars_weights(model: Mars, source: Source, stage: str) -> None:
    """Fills a model that is not yet sharded, and logs the decision. A start takes averaged weights where there are."""
    if source.kind == "scratch":
        logger.info("starting stage '%s': experts are copies of the language model's layers", stage)
        return
    state, is_start = source.state, source.kind == "start"
    averaged = state["model_ema"] if is_start else {}
    model.load_visual_state({**state["model"], **averaged}, str(source.path))
    if is_start:
        kinds = "averaged weights" if averaged else "weights"
        logger.info("starting stage '%s' at epoch 0 with a fresh optimizer from the %s of %s (stage '%s', step %d)",
                    stage, kinds, source.path, state["stage"], state["step"])  # fmt: skip
    else:
        at = source.position
        logger.warning("continuing stage '%s' from %s at epoch %d, step %d (image %d of the epoch)",
                       stage, source.path, at.epoch, at.step, at.images)  # fmt: skip


def mars_content(
    state: MarsState, position: Position, identity: MarsIdentity, args: Mapping[str, Any], global_batch: int
) -> dict[str, Any]:
    """The checkpoint. Collective under FSDP: every process calls it, rank 0's is whole."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {
        "format": RUN_FORMAT,
        MARS_ENTRY: identity.as_dict(),
        "stage": identity.stage,
        "model": gathered(state.model.visual_state()),
        "model_ema": gathered(state.ema.state_dict()),
        "optimizer": get_optimizer_state_dict(state.model, state.optimizer, options=options),
        "epoch": position.epoch,
        "step": position.step,
        "images_in_epoch": position.images,
        "batch_in_epoch": position.images // global_batch,
        "global_batch": global_batch,
        "args": dict(args),
    }


@dataclass(frozen=True)
class MarsCheckpoint:
    """Writes checkpoint-last.pth, as `CheckpointWriter`."""

    state: MarsState
    identity: MarsIdentity
    output_dir: Path
    args: dict[str, Any]
    global_batch: int
    dist: DistInfo
    open_interval: Callable[[], dict[str, Any]]
    keep_every: int = 0

    def save(self, position: Position) -> None:
        """Every process calls it, and all fail if the file cannot be written."""
        content = self.content(position) | {"open_interval": gather_objects(self.open_interval())}
        with failing_together():
            self.write(content, position)

    def save_alone(self, position: Position) -> None:
        """For rank 0 when the others are gone: without their parts of the next log line."""
        self.write(self.content(position) | {"open_interval": []}, position)

    def content(self, position: Position) -> dict[str, Any]:
        return mars_content(self.state, position, self.identity, self.args, self.global_batch)

    def write(self, content: dict[str, Any], position: Position) -> None:
        if self.dist.is_main:
            write_checkpoint(content, position, self.output_dir, self.keep_every)
