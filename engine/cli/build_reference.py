"""The frozen start of a run, which its loss holds on to: built from the source, kept in checkpoints."""

from __future__ import annotations

import argparse

from torch import Tensor
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from engine.cli.build import Parts, place_model
from engine.train.parallel import gathered
from engine.train.state import TrainState
from models.build import build_model
from models.structmar import StructMAR
from models.weights import load_structmar_weights


def build_reference(args: argparse.Namespace, parts: Parts, needed_by: str) -> StructMAR:
    """The averaged weights that the run started from; where it continues, those that its checkpoint kept.

    needed_by: what this run has it for, in words. Raises ValueError naming the file and this if it kept none.
    """
    source = parts.source
    kept: dict[str, Tensor] = source.state.get("reference" if source.kind == "continue" else "model_ema", {})
    if source.kind == "continue" and not kept:
        raise ValueError(f"{source.path} has no reference, it was written without; {needed_by} needs it")
    reference = build_model(parts.config)
    load_structmar_weights(reference, {**source.state["model"], **kept}, str(source.path))
    place_model(args, reference.requires_grad_(False).eval(), parts.dist)
    open_denoise(reference)
    return reference


def reference_content(reference: StructMAR | None, state: TrainState) -> dict[str, Tensor]:
    """What a checkpoint keeps of it: as far as the weights that train can leave it. Collective under FSDP."""
    start = {} if reference is None else dict(reference.named_parameters())
    return gathered({name: parameter.detach() for name, parameter in start.items() if name in state.trainable})


def open_denoise(model: StructMAR) -> None:
    """A sharded model gathers its weights for `forward` alone, unless it is told of other methods."""
    if isinstance(model, FSDPModule):
        for method in ("denoise", "code_logits", "predictions", "token_conditions"):
            register_fsdp_forward_method(model, method)
