"""What a StructMAR checkpoint holds, and how a run starts: from scratch, from other weights, or where it left off.

A checkpoint is a dictionary of plain values and whole tensors (the same file under one process, DDP and FSDP):
    format, stage (the train_mode), model, model_ema (what trains), optimizer (state by parameter name), epoch, step,
    batch_in_epoch, global_batch, config, args, vae {id, latent_scale}, text_encoder {id}, categories [{id, name}];
    of stage 3 (grpo) also reward_detector (sha256), reference (what trains, as it was at the start) and held_out.

--resume means *continue* where the same stage wrote the file (everything is restored), *start from* otherwise: MAR's
weights or another stage's, averaged ones where there are, with a fresh optimizer at epoch 0. A checkpoint-last.pth of
the same stage in the output folder is continued first, so that a killed run goes on by the same command.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
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

from engine.checkpoint.identity import WeightsInfo
from engine.train.parallel import gathered
from engine.train.state import Position, TrainState
from models.structmar import StructMAR, StructMARConfig
from models.weights import LoadReport, is_mar_state, load_mar_weights, load_structmar_weights
from util.checkpoint import LAST_NAME, load_plain, resolve_checkpoint, safetensors_metadata
from util.types import Category

logger = logging.getLogger(__name__)

FORMAT = 1
TRAINING_FIELDS = (
    "diffusion_batch_mul",
    "attn_dropout",
    "proj_dropout",
    "grad_checkpointing",
)  # may change between runs


@dataclass(frozen=True)
class Identity:
    """What weights are made for. Weights of another identity are refused, except where MAR's weights know none of it.

    text_encoder_id: "" for a model without text parts.
    """

    config: StructMARConfig
    vae_id: str
    latent_scale: float
    text_encoder_id: str
    categories: tuple[Category, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "vae": {"id": self.vae_id, "latent_scale": self.latent_scale},
            "text_encoder": {"id": self.text_encoder_id},
            "categories": [{"id": category.id, "name": category.name} for category in self.categories],
        }


@dataclass(frozen=True)
class Source:
    """Where a run starts. kind: 'scratch', 'start' (weights only) or 'continue'. state: the file's content."""

    kind: str
    path: Path | None
    state: dict[str, Any]

    @property
    def position(self) -> Position:
        if self.kind != "continue":
            return Position()
        return Position(self.state["epoch"], self.state["step"], self.state["batch_in_epoch"])


def find_source(output_dir: str | Path, resume: str, auto_resume: bool, stage: str) -> Source:
    """Decides where a run of `stage` starts and reads that file. Loads nothing into a model and writes nothing.

    Raises FileNotFoundError or ValueError naming the file if it is missing, unreadable or unknown, or if the output
    folder holds another stage's checkpoint, which this run would overwrite.
    """
    own = Path(output_dir) / LAST_NAME
    if own.is_file() and auto_resume:
        state = read_weights_file(own)
        if state["stage"] != stage:
            raise ValueError(
                f"{own} was written by stage '{state['stage']}', this run is stage '{stage}' and would overwrite it: "
                f"choose another --output_dir (and pass --resume {own} to start from it)"
            )
        return Source("continue", own, state)
    if not resume:
        return Source("scratch", None, {})
    path = resolve_checkpoint(resume)
    state = read_weights_file(path)
    can_continue = state["stage"] == stage and "optimizer" in state
    return Source("continue" if can_continue else "start", path, state)


def read_weights_file(path: str | Path) -> dict[str, Any]:
    """A training checkpoint, an exported file, MAR's checkpoint or MAR's weights, as one kind of dictionary:
    at least stage, model and model_ema. The stage of MAR's files is 'mar'."""
    file = resolve_checkpoint(path)
    loaded = load_plain(file, mmap=True)
    if "format" in loaded:
        return _checked(loaded, file)
    if file.suffix == ".safetensors":
        metadata = safetensors_metadata(file)
        if "config" in metadata:
            info = WeightsInfo.from_metadata(metadata, file)
            weights = {name: tensor.float() for name, tensor in loaded.items()}
            return {"stage": info.stage, "step": info.step, "model": weights, "model_ema": {}} | _identity_of(
                info
            ).to_dict()
    weights = loaded.get("model", loaded)
    if not isinstance(weights, dict) or not is_mar_state(weights):
        raise ValueError(
            f"{file} is neither a StructMAR checkpoint nor MAR's weights; it holds {sorted(map(str, loaded))[:6]}"
        )
    return {"stage": "mar", "model": weights, "model_ema": loaded.get("model_ema", {}) if weights is not loaded else {}}


def _checked(state: dict[str, Any], file: Path) -> dict[str, Any]:
    if state["format"] != FORMAT:
        raise ValueError(f"{file} has checkpoint format {state['format']}, this version reads {FORMAT}")
    needed = ("stage", "model", "model_ema", "optimizer", "epoch", "step", "batch_in_epoch", "global_batch", "args",
              "config", "vae", "text_encoder", "categories")  # fmt: skip
    missing = [name for name in needed if name not in state]
    if missing:
        raise ValueError(f"{file} is a checkpoint without {missing}")
    return state


def _identity_of(info: WeightsInfo) -> Identity:
    return Identity(info.config, info.vae_id, info.latent_scale, info.text_encoder_id, info.categories)


def check_identity(source: Source, expected: Identity) -> None:
    """Raises ValueError naming the file, the field and both values if the weights were made for something else.

    Weights without text or layout parts (MAR's, or our class-conditional ones) know no captions and no categories.
    """
    if source.kind == "scratch" or source.state["stage"] == "mar":
        return
    state, wanted = source.state, expected.to_dict()
    _refuse_other_config(source, wanted["config"])
    for field in ("id", "latent_scale"):
        _refuse_other(source, f"vae {field}", state["vae"][field], wanted["vae"][field], "--vae_path or --latent_scale")
    if not is_backbone(source):
        found, needed = state["text_encoder"]["id"], wanted["text_encoder"]["id"]
        _refuse_other(source, "text_encoder id", found, needed, "--clip_path")
        _refuse_other(
            source, "categories", *_first_difference(state["categories"], wanted["categories"]), "--coco_root"
        )


def is_backbone(source: Source) -> bool:
    """Whether the weights are a MAR backbone without any of the new parts."""
    return source.state["stage"] == "mar" or is_mar_state(source.state["model"])


def _refuse_other_config(source: Source, wanted: Mapping[str, Any]) -> None:
    skipped = {*TRAINING_FIELDS}
    if is_backbone(source):
        skipped |= {"num_categories", "text_dim", "rope_mode", "max_objects", "class_num", "cross_attn_every"}
        skipped |= {"layout_bias_value", "layout_bias_encoder", "layout_bias_decoder", "layout_fourier"}
    found = source.state["config"]
    names = [name for name in {**wanted, **found} if name not in skipped and found.get(name) != wanted.get(name)]
    if names:
        listed = "; ".join(f"{name} {found.get(name)} in the file, {wanted.get(name)} here" for name in names)
        raise ValueError(f"{source.path} was made for another architecture: {listed}")


def _refuse_other(source: Source, field: str, found: Any, wanted: Any, flag: str) -> None:
    if found != wanted:
        raise ValueError(f"{source.path} was made with {field} {found}, this run has {wanted} (see {flag})")


def _first_difference(found: list[Any], wanted: list[Any]) -> tuple[Any, Any]:
    """The first entries that differ, or both lengths: eighty names would hide what is wrong."""
    for one, other in zip(found, wanted, strict=False):
        if one != other:
            return one, other
    return len(found), len(wanted)


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
    load = load_mar_weights if is_backbone(source) and source.kind == "start" else load_structmar_weights
    report = load(model, weights, str(source.path))
    kinds = "EMA weights" if averaged else "weights"
    if source.kind == "continue":
        position = source.position
        logger.warning("continuing stage '%s' from %s at epoch %d, step %d (batch %d of the epoch)",
                       stage, source.path, position.epoch, position.step, position.batch)  # fmt: skip
    else:
        logger.info("starting stage '%s' at epoch 0 with a fresh optimizer from the %s of %s (%s)",
                    stage, kinds, source.path, _describe(state))  # fmt: skip
    report.log(logger)
    return report


def _describe(state: Mapping[str, Any]) -> str:
    parts = [f"stage '{state['stage']}'"]
    parts += [f"{name} {state[name]}" for name in ("epoch", "step") if name in state]
    return ", ".join(parts)


def restore(learner: TrainState, source: Source) -> None:
    """Optimizer and EMA of a continued run (weights are loaded before sharding). Raises ValueError naming the file."""
    if source.kind != "continue":
        return
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    optimizer_state = source.state["optimizer"]
    names = {name for group in optimizer_state["param_groups"] for name in group["params"]}
    if names != set(learner.trainable):
        odd = sorted(names ^ set(learner.trainable))
        raise ValueError(f"{source.path}: its optimizer holds {len(names)} parameters, this run trains "
                         f"{len(learner.trainable)}; first difference {odd[0]}")  # fmt: skip
    settings = [{key: group[key] for key in group if key != "params"} for group in learner.optimizer.param_groups]
    set_optimizer_state_dict(learner.model, learner.optimizer, optimizer_state, options=options)
    for group, setting in zip(learner.optimizer.param_groups, settings, strict=True):
        group.update(setting)  # this run's flags, not the file's
    try:
        learner.ema.load_state_dict(source.state["model_ema"])
    except ValueError as error:
        raise ValueError(f"{source.path}: {error}") from error


def resumed_position(source: Source, global_batch: int, accum_iter: int, steps_per_epoch: int) -> Position:
    """Where training goes on. With other batch sizes than the file's, the epoch continues after about as many images,
    at a whole step."""
    at, batch = source.position, source.position.batch
    if source.kind == "continue" and source.state["global_batch"] != global_batch:
        batch = batch * source.state["global_batch"] // global_batch
        logger.warning("%s was written with %d images per pass, here are %d: epoch %d goes on at batch %d",
                       source.path, source.state["global_batch"], global_batch, at.epoch, batch)  # fmt: skip
    step_of_epoch = batch // accum_iter
    if step_of_epoch >= steps_per_epoch:
        return Position(at.epoch + 1, at.step, 0)
    return Position(at.epoch, at.step, step_of_epoch * accum_iter)


def log_changed_args(source: Source, args: Mapping[str, Any], ignored: tuple[str, ...]) -> None:
    """A continued run may change its flags; it says which."""
    if source.kind != "continue":
        return
    before = source.state["args"]
    changed = [name for name in args if name not in ignored and before.get(name) != args[name]]
    for name in changed:
        logger.warning("continuing with another --%s: %s, before %s", name, args[name], before.get(name))


def checkpoint_content(
    learner: TrainState, position: Position, stage: str, identity: Identity, args: Mapping[str, Any], global_batch: int
) -> dict[str, Any]:
    """The checkpoint. Collective under FSDP: every process calls it, rank 0's is whole."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    is_sharded = isinstance(learner.model, FSDPModule)
    model = get_model_state_dict(learner.model, options=options) if is_sharded else learner.model.state_dict()
    optimizer = get_optimizer_state_dict(learner.model, learner.optimizer, options=options)
    return {
        "format": FORMAT,
        "stage": stage,
        "model": dict(model),
        "model_ema": gathered(learner.ema.state_dict()),
        "optimizer": optimizer,
        "epoch": position.epoch,
        "step": position.step,
        "batch_in_epoch": position.batch,
        "global_batch": global_batch,
        "args": dict(args),
        **identity.to_dict(),
    }
