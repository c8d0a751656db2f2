"""Loading weights strictly against named differences, and choosing what trains.

MAR's files hold the backbone only; ours hold everything. Nothing is skipped in silence: what is new, absent or ignored
is a named list in the report, and anything else is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.config import TRAIN_MODES
from models.structmar import StructMAR, StructMARConfig
from util.weights import tensor_problem

TEXT_PARTS = ("text_null", "text_pool_proj.", ".cross.")
LAYOUT_PARTS = ("layout_embed.",)
PHRASE_PARTS = ("layout_embed.unknown", "layout_embed.phrase")  # of the layout parts
ROPE_PARTS = (".rope_strength",)
SIZE_PARTS = ("size_embed.",)
NEW_PARTS = (*TEXT_PARTS, *LAYOUT_PARTS, *ROPE_PARTS, *SIZE_PARTS)
CLASS_PARTS = ("class_emb.",)
HEAD_PARTS = ("diffloss.", "code_head.")
FEW_PARTS = ("diffloss.few.",)  # of the head parts
TOKEN_PARTS = ("z_proj.", *HEAD_PARTS)  # what knows the tokens


def _belongs(name: str, parts: tuple[str, ...]) -> bool:
    return any(part in name if part.startswith(".") else name.startswith(part) for part in parts)


def is_trainable(name: str, mode: str) -> bool:
    """Whether parameter `name` trains in a mode.

    text_layout (stage 1): the new parts. text_proj: the text parts alone. full (stages 2 and 3) and distill (between
    them): everything but the class embedding, which images with captions never use. backbone: as full, without the
    token head. class: MAR itself, with the strength of its rotations where it has any. few_step: the few-step head
    alone, which no other mode trains.
    """
    if mode == "few_step":
        return _belongs(name, FEW_PARTS)
    if _belongs(name, FEW_PARTS):
        return False
    if mode == "text_layout":
        return _belongs(name, NEW_PARTS)
    if mode == "text_proj":
        return _belongs(name, TEXT_PARTS)
    if mode in ("full", "distill"):
        return not _belongs(name, CLASS_PARTS)
    if mode == "backbone":
        return not _belongs(name, (*CLASS_PARTS, *HEAD_PARTS))
    if mode == "class":
        return not _belongs(name, (*TEXT_PARTS, *LAYOUT_PARTS))
    raise ValueError(f"unknown train_mode {mode!r}, choose one of {TRAIN_MODES}")


def select_trainable(model: StructMAR, mode: str) -> dict[str, nn.Parameter]:
    """Freezes the rest and returns what trains, by name. Learned positions that are switched off stay frozen."""
    chosen = {}
    for name, parameter in model.named_parameters():
        switched_off = "pos_embed_learned" in name and not model.config.learned_pos
        parameter.requires_grad_(is_trainable(name, mode) and not switched_off)
        if parameter.requires_grad:
            chosen[name] = parameter
    if not chosen:
        raise ValueError(f"train_mode {mode!r} trains nothing: the model has none of its parts")
    return chosen


def part_of(name: str) -> str:
    """The part of the model a parameter belongs to, for tables: encoder, decoder, head, text, layout, rope, size..."""
    for part, parts in (("text", TEXT_PARTS), ("layout", LAYOUT_PARTS), ("rope", ROPE_PARTS), ("size", SIZE_PARTS)):
        if _belongs(name, parts):
            return part
    if name.startswith(HEAD_PARTS):
        return "head"
    if name.startswith(("decoder_", "mask_token", "diffusion_pos")):
        return "decoder"
    return "class_emb" if name.startswith("class_emb.") else "encoder"


def summarize_trainable(model: StructMAR) -> list[tuple[str, int, int]]:
    """(part, parameters, trainable parameters) of each part, in the model's order."""
    rows: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        total, trainable = rows.get(part_of(name), (0, 0))
        rows[part_of(name)] = (total + parameter.numel(), trainable + parameter.numel() * parameter.requires_grad)
    return [(part, total, trainable) for part, (total, trainable) in rows.items()]


@dataclass(frozen=True)
class LoadReport:
    """What a load did. new: parameters that keep their initial values. ignored: tensors of the file without a place."""

    source: str
    num_loaded: int
    new: tuple[str, ...]
    ignored: tuple[str, ...]

    def log(self, logger: logging.Logger) -> None:
        logger.info("loaded %d tensors from %s", self.num_loaded, self.source)
        for what, names in (("new, at their initial values", self.new), ("ignored", self.ignored)):
            if names:
                shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
                logger.info("  %d tensors %s: %s", len(names), what, shown)


def is_mar_state(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is MAR's own: a backbone that knows no captions and no layouts."""
    return "fake_latent" in state and not any(_belongs(name, (*TEXT_PARTS, *LAYOUT_PARTS)) for name in state)


def load_mar_weights(model: StructMAR, state: Mapping[str, Tensor], source: str) -> LoadReport:
    """Fills the backbone with MAR weights; the new parts keep their initial values, which change nothing.

    A class embedding of another number of classes is ignored (captions do not use it), and so are learned positions
    when the model was built without. A discrete head takes the blocks alone of weights with a diffusion head: what
    embeds tokens and draws them is new. Raises ValueError on any other difference.
    """
    ignorable: list[str] = []
    new_parts: tuple[str, ...] = NEW_PARTS
    if model.config.head == "discrete" and any(name.startswith("diffloss.") for name in state):
        ignorable += [name for name in state if name.startswith(TOKEN_PARTS)]
        new_parts += TOKEN_PARTS
    if "class_emb.weight" in state and state["class_emb.weight"].shape != model.class_emb.weight.shape:
        ignorable.append("class_emb.weight")
    if not model.config.learned_pos:
        ignorable += [name for name in state if "pos_embed_learned" in name]
    return _load(model, state, source, new_parts=new_parts, ignorable=tuple(ignorable))


def with_few_step(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with a few-step head, which begins as the diffusion network where they have none."""
    few, net = FEW_PARTS[0], "diffloss.net."
    begun = {few + name.removeprefix(net): tensor for name, tensor in state.items() if name.startswith(net)}
    return {**begun, **state}


def load_structmar_weights(
    model: StructMAR, state: Mapping[str, Tensor], source: str, new_parts: tuple[str, ...] = ()
) -> LoadReport:
    """Fills the whole model; `new_parts` that the file lacks keep their initial values. Raises ValueError on any other
    difference."""
    return _load(model, state, source, new_parts, ignorable=())


def require_own_sizes(config: StructMARConfig, state: Mapping[str, Tensor], source: str) -> None:
    """Raises ValueError if a file's config is not that of its own tensors, before a model of whatever size is made."""
    parts = {"encoder_depth": "encoder_blocks", "decoder_depth": "decoder_blocks"}
    if config.head == "diffusion":
        parts["diffloss_d"] = "diffloss.net.res_blocks"
    for field, part in parts.items():
        found = {name[len(part) :].split(".")[1] for name in state if name.startswith(f"{part}.")}
        if len(found) != getattr(config, field):
            raise ValueError(f"{source}: its config has {field} {getattr(config, field)}, its tensors {len(found)}")
    with torch.device("meta"):
        own = StructMAR(config).state_dict()
    _fitting(own, state, source, new=(), ignorable=())


@torch.no_grad()
def _load(
    model: StructMAR, state: Mapping[str, Tensor], source: str, new_parts: tuple[str, ...], ignorable: tuple[str, ...]
) -> LoadReport:
    own = model.state_dict()
    new = [name for name in own if name not in state and (_belongs(name, new_parts) or name in ignorable)]
    new += [name for name in ignorable if name in own and name not in new]
    taken = _fitting(own, state, source, new, ignorable)
    bad = [problem for name in taken if (problem := tensor_problem(name, state[name], own[name])) is not None]
    if bad:
        raise ValueError(f"{source} does not fit the model: {'; '.join(bad[:3])} ({len(bad)} in all)")
    for name in taken:
        own[name].copy_(state[name])
    return LoadReport(source, len(taken), tuple(new), tuple(name for name in ignorable if name in state))


def _fitting(
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    source: str,
    new: Collection[str],
    ignorable: Collection[str],
) -> list[str]:
    """The names that the model takes from the file. Raises ValueError listing names and sizes that do not fit."""
    missing = [name for name in own if name not in state and name not in new]
    surplus = [name for name in state if name not in own and name not in ignorable]
    taken = [name for name in own if name in state and name not in ignorable]
    wrong = [
        f"{name}: {tuple(state[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in taken
        if isinstance(state[name], Tensor) and state[name].shape != own[name].shape
    ]
    problems = [f"missing {missing[:5]} ({len(missing)} in all)"] if missing else []
    problems += [f"unknown {surplus[:5]} ({len(surplus)} in all)"] if surplus else []
    problems += [f"other sizes: {'; '.join(wrong[:5])} ({len(wrong)} in all)"] if wrong else []
    if problems:
        raise ValueError(f"{source} does not fit the model: {'; '.join(problems)}")
    return taken
