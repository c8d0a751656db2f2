"""How a run starts: from scratch, from other weights, or where it left off; and what its checkpoint holds.

--resume means *continue* where the same stage wrote the file (everything is restored), *start from* otherwise: MAR's
weights or another stage's, averaged ones where there are, with a fresh optimizer at epoch 0. A checkpoint-last.pth of
the same stage in the output folder is continued first, so that a killed run goes on by the same command.
The file's layout is described in engine/checkpoint/files.py.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule

from engine.checkpoint.content import CHECKPOINT_FORMAT, check_optimizer
from engine.checkpoint.files import MAR_STAGE, identity_of, read_weights_file
from engine.checkpoint.identity import Identity, require_same_classes, require_same_identity
from engine.data.coco import ResumableSampler
from engine.train.loop import Step
from engine.train.mars import MarsState
from engine.train.parallel import gathered
from engine.train.state import Course, Position, TrainState
from models.structmar import StructMAR
from models.weights import (
    PHRASE_PARTS,
    LoadReport,
    is_mar_state,
    load_mar_weights,
    load_structmar_weights,
    with_few_step,
)
from util.checkpoint import resolve_checkpoint
from util.distributed import DistInfo
from util.names import BEST_NAME, LAST_NAME
from util.weights import tensor_problem

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Where a run starts. kind: 'scratch', 'start' (weights only) or 'continue'. state: the file's content."""

    kind: str
    path: Path | None
    state: dict[str, Any]

    @property
    def identity(self) -> Identity | None:
        """What the weights were made for; None from scratch and for MAR's files, which do not say."""
        return None if self.path is None else identity_of(self.state, self.path)

    @property
    def has_ema_warmup(self) -> bool:
        """Of the run that is continued; files of before the flag have none. A run that starts has one."""
        return self.kind != "continue" or bool(self.state["args"].get("ema_warmup", False))

    @property
    def position(self) -> Position:
        if self.kind != "continue":
            return Position()
        state = self.state
        images = state.get("images_in_epoch", state["batch_in_epoch"] * state["global_batch"])  # once in batches alone
        return Position(state["epoch"], state["step"], images)


def find_source(output_dir: str | Path, resume: str, auto_resume: bool, stage: str) -> Source:
    """Decides where a run of `stage` starts and reads that file. Loads nothing into a model and writes nothing.

    Raises FileNotFoundError or ValueError naming the file if it is missing, unreadable or unknown, or if the output
    folder holds another stage's checkpoint, which this run would overwrite.
    """
    own = Path(output_dir) / LAST_NAME
    if os.path.lexists(own) and auto_resume:
        state = read_weights_file(own)
        if state["stage"] != stage:
            raise ValueError(
                f"{own} was written by stage '{state['stage']}', this run is stage '{stage}' and would overwrite it: "
                f"choose another --output_dir (and pass --resume {own} to start from it)"
            )
        if resume and Path(resume).resolve() == own.with_name(BEST_NAME).resolve():
            raise ValueError(
                f"--resume {resume} starts over from the best weights, but {own} would be continued: add "
                "--no-auto_resume, which overwrites it, or choose another --output_dir"
            )
        own_names = (own.resolve(), own.parent.resolve())
        if resume and resume != state["args"].get("resume") and Path(resume).resolve() not in own_names:
            logger.warning("--resume %s is not read: %s is continued; for the former choose another --output_dir, or "
                           "--no-auto_resume, which overwrites the latter", resume, own)  # fmt: skip
        return Source("continue", own, state)
    if not resume:
        return Source("scratch", None, {})
    path = resolve_checkpoint(resume)
    state = read_weights_file(path)
    can_continue = state["stage"] == stage and "optimizer" in state
    return Source("continue" if can_continue else "start", path, state)


def check_identity(source: Source, expected: Identity, adds_few_step: bool = False) -> None:
    """Raises ValueError naming the file, the field and both values if the weights were made for something else.
    adds_few_step: a run that starts may have a few-step head which they lack.

    Weights without text or layout parts (MAR's, or our class-conditional ones) know no captions and no categories.
    """
    found = source.identity
    if found is not None:
        is_start = source.kind == "start"
        require_same_identity(found, expected, source.path, is_start and is_backbone(source), is_start, adds_few_step)
        if not is_start:
            require_same_classes(found, expected, source.path)


def check_training_state(source: Source) -> None:
    """Raises ValueError naming the file and the tensor if a run cannot be continued from it as it was."""
    if source.kind != "continue":
        return
    state = source.state
    check_optimizer(state, source.path)
    parts: dict[str, Mapping[str, Any]] = {"model_ema": state["model_ema"], "reference": state.get("reference", {})}
    parts |= {f"optimizer state of {name}": entries for name, entries in state["optimizer"]["state"].items()}
    for part, tensors in parts.items():
        for name, tensor in tensors.items():
            if (problem := tensor_problem(name, tensor)) is not None:
                raise ValueError(f"{source.path}: {part}: {problem}")


def is_backbone(source: Source) -> bool:
    """Whether the weights are a MAR backbone without any of the new parts."""
    return source.state["stage"] == MAR_STAGE or is_mar_state(source.state["model"])


def load_weights(model: StructMAR, source: Source, stage: str) -> LoadReport | None:
    """Fills a model that is not yet sharded, and logs the decision. From scratch the rotation has its full strength."""
    if source.kind == "scratch":
        if model.config.rope_mode == "gated":
            model.set_rope_strength(1.0)
        logger.warning("starting stage '%s' from scratch: no --resume was given, nothing is pretrained", stage)
        return None
    state = source.state
    averaged: dict[str, Tensor] = {} if source.kind == "continue" else state["model_ema"]
    weights = {**state["model"], **averaged}
    if source.kind == "start" and model.config.few_step_head:
        weights = with_few_step(weights)
    if source.kind == "start" and is_backbone(source):
        report = load_mar_weights(model, weights, str(source.path))
    else:
        report = load_structmar_weights(model, weights, str(source.path), _parts_to_add(model, source))
    kinds = "EMA weights" if averaged else "weights"
    if source.kind == "continue":
        position = source.position
        logger.warning("continuing stage '%s' from %s at epoch %d, step %d (image %d of the epoch)",
                       stage, source.path, position.epoch, position.step, position.images)  # fmt: skip
    else:
        logger.info("starting stage '%s' at epoch 0 with a fresh optimizer from the %s of %s (%s)",
                    stage, kinds, source.path, _describe(state))  # fmt: skip
    report.log(logger)
    return report


def _parts_to_add(model: StructMAR, source: Source) -> tuple[str, ...]:
    """Those that a run may begin with although its weights were made without them."""
    found = source.identity
    is_without = source.kind == "start" and found is not None and not found.config.phrases
    return PHRASE_PARTS if is_without else ()


def _describe(state: Mapping[str, Any]) -> str:
    parts = [f"stage '{state['stage']}'"]
    parts += [f"{name} {state[name]}" for name in ("epoch", "step") if name in state]
    return ", ".join(parts)


def restore(state: TrainState | MarsState, source: Source) -> None:
    """Optimizer and EMA of a continued run (weights are loaded before sharding). Raises ValueError naming the file."""
    if source.kind != "continue":
        return
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    optimizer_state = source.state["optimizer"]
    names = {name for group in optimizer_state["param_groups"] for name in group["params"]}
    if names != set(state.trainable):
        odd = sorted(names ^ set(state.trainable))
        raise ValueError(f"{source.path}: its optimizer holds {len(names)} parameters, this run trains "
                         f"{len(state.trainable)}; first difference {odd[0]}")  # fmt: skip
    settings = [{key: group[key] for key in group if key != "params"} for group in state.optimizer.param_groups]
    set_optimizer_state_dict(state.model, state.optimizer, optimizer_state, options=options)
    for group, setting in zip(state.optimizer.param_groups, settings, strict=True):
        group.update(setting)  # this run's flags, not the file's
    try:
        state.ema.load_state_dict(source.state["model_ema"])
    except ValueError as error:
        raise ValueError(f"{source.path}: {error}") from error


def restore_order(sampler: ResumableSampler, source: Source) -> None:
    """Which images of the epoch were seen. Raises ValueError naming the file if this run could not have seen them."""
    position = source.position  # of a run that starts: image 0 of epoch 0
    try:
        sampler.restore(source.state, position.epoch, position.images)
    except ValueError as error:
        raise ValueError(f"{source.path}: {error}") from error


def restore_open_interval(step: Step, source: Source, dist: DistInfo) -> None:
    """What was noted since the last log line, if as many processes go on as wrote it: each has its own part."""
    parts: list[dict[str, Any]] = source.state.get("open_interval", [])
    if len(parts) == dist.world_size:
        step.reopen(parts[dist.rank])


def resumed_position(source: Source, course: Course) -> Position:
    """Where training goes on: after as many images of the epoch as were seen, whatever the batches were and are."""
    return course.entered(source.position)


def log_continuation(source: Source, course: Course, global_batch: int) -> None:
    """Says what a continued run does that one without a stop would not have done, and where nothing is left to do."""
    if source.kind != "continue":
        return
    at, before = source.position, source.state["global_batch"]
    start = resumed_position(source, course)
    if before != global_batch:
        logger.warning(
            "%s was written with %d images per pass, here are %d: epoch %d goes on after its first %d images, the run "
            "ends after %d epochs as before; what is drawn at random differs",
            source.path, before, global_batch, at.epoch, at.images, course.epochs,
        )  # fmt: skip
    if at.images and start.epoch > at.epoch:
        logger.warning("the last %d images of epoch %d do not fill a step of %d and are left out",
                       max(0, course.images - at.images), at.epoch, course.images_per_step)  # fmt: skip
    if course.is_finished(start):
        logger.warning(
            "nothing is left to do: %s has done %d epochs and %d steps, asked for are %s: raise them to go on, or, to "
            "start afresh from its weights, export them (python -m scripts.export_weights) and --resume the export",
            source.path, start.epoch, start.step, _describe_end(course),
        )  # fmt: skip


def _describe_end(course: Course) -> str:
    steps = "" if course.max_steps is None else f" and at most {course.max_steps} steps"
    return f"{course.epochs} (--epochs){steps}"


def log_changed_args(source: Source, args: Mapping[str, Any], ignored: tuple[str, ...]) -> None:
    """A continued run may change its flags; it says which."""
    if source.kind != "continue":
        return
    before = source.state["args"]
    changed = [name for name in args if name in before and name not in ignored and before[name] != args[name]]
    for name in changed:
        logger.warning("continuing with another --%s: %s, before %s", name, args[name], before[name])


def whole_model(state: TrainState) -> dict[str, Tensor]:
    """All weights, as they are. Collective under FSDP, where rank 0's are whole."""
    if not isinstance(state.model, FSDPModule):
        return dict(state.model.state_dict())
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole: dict[str, Any] = get_model_state_dict(state.model, options=options)
    return whole


def checkpoint_content(
    state: TrainState, position: Position, stage: str, identity: Identity, args: Mapping[str, Any], global_batch: int
) -> dict[str, Any]:
    """The checkpoint. Collective under FSDP: every process calls it, rank 0's is whole."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    optimizer = get_optimizer_state_dict(state.model, state.optimizer, options=options)
    return {
        "format": CHECKPOINT_FORMAT,
        "model": whole_model(state),
        "model_ema": gathered(state.ema.state_dict()),
        "optimizer": optimizer,
        "epoch": position.epoch,
        "images_in_epoch": position.images,
        "batch_in_epoch": position.images // global_batch,
        "global_batch": global_batch,
        "args": dict(args),
        **replace(identity, stage=stage, step=position.step).to_dict(),
    }
