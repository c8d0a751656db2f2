"""Is a checkpoint's dictionary what a checkpoint is? Names, types and shapes; the first thing wrong is named.

What its tensors hold is looked at where they are loaded (util/weights.py), checksums where the file is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

CHECKPOINT_FORMAT = 1
LARGEST_COUNT = 10**12
_KINDS: dict[type, str] = {dict: "a dictionary", list: "a list", str: "a text"}
_NEEDED: dict[str, type] = {
    "stage": str,
    "model": dict,
    "model_ema": dict,
    "optimizer": dict,
    "epoch": int,
    "step": int,
    "batch_in_epoch": int,
    "global_batch": int,
    "args": dict,
    "config": dict,
    "vae": dict,
    "text_encoder": dict,
    "categories": list,
}
_OPTIONAL: dict[str, type] = {"images_in_epoch": int, "sampling": dict, "reward_detector": str, "reference": dict,
                             "class_names": list, "buckets": dict, "guidance": list, "teacher": dict}  # fmt: skip


def check_content(state: Mapping[str, Any], file: Path) -> None:
    """Raises ValueError naming the file and the first entry that is missing, of another type or out of range."""
    version = state["format"]
    if type(version) is not int or version != CHECKPOINT_FORMAT:
        raise ValueError(f"{file} has checkpoint format {_short(version)}, this version reads {CHECKPOINT_FORMAT}")
    missing = [name for name in _NEEDED if name not in state]
    if missing:
        raise ValueError(f"{file} is a checkpoint without {missing}")
    for name, kind in (_NEEDED | _OPTIONAL).items():
        if name in state:
            _check_entry(name, state[name], kind, file)
    batches = state.get("images_in_epoch", 0) // state["global_batch"]
    if "images_in_epoch" in state and state["batch_in_epoch"] != batches:
        raise ValueError(
            f"{file}: batch_in_epoch is {state['batch_in_epoch']}, but images_in_epoch {state['images_in_epoch']} and "
            f"global_batch {state['global_batch']} make {batches}"
        )
    for name in ("model_ema", "reference"):
        _check_part_of_model(name, state.get(name, {}), state["model"], file)
    trained = _trained(state["optimizer"])
    if trained is not None and trained != set(state["model_ema"]):
        odd = sorted(trained ^ set(state["model_ema"]))[0]
        raise ValueError(
            f"{file}: its optimizer has {len(trained)} parameters, model_ema {len(state['model_ema'])}; the first "
            f"that only one of them has is {odd}"
        )


def check_optimizer(state: Mapping[str, Any], file: Path | None) -> None:
    """What a continued run needs besides. Raises ValueError naming the file and the first thing that is wrong."""
    optimizer, model = state["optimizer"], state["model"]
    trained = _trained(optimizer)
    if trained is None or not isinstance(optimizer.get("state"), dict):
        raise ValueError(f"{file}: its optimizer state is missing, it cannot be continued; exported, it is weights")
    moments = optimizer["state"]
    if set(moments) != trained and (moments or state["step"]):
        odd = sorted(map(str, trained ^ set(moments)))[0]
        raise ValueError(
            f"{file}: its optimizer has the state of {len(moments)} of {len(trained)} parameters after {state['step']} "
            f"steps; the first that differs is {odd}"
        )
    for name, entries in moments.items():
        for moment in ("exp_avg", "exp_avg_sq", "step"):
            value = entries.get(moment) if isinstance(entries, dict) else None
            shape = () if moment == "step" else tuple(model[name].shape) if name in model else None
            if not isinstance(value, Tensor) or tuple(value.shape) != shape:
                found = tuple(value.shape) if isinstance(value, Tensor) else _short(value)
                raise ValueError(f"{file}: its optimizer's {moment} of {name} is {found}, not a tensor of {shape}")


def _trained(optimizer: Mapping[str, Any]) -> set[str] | None:
    """The names in its groups; None where it has none, or other things than names."""
    groups = optimizer.get("param_groups")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return None
    lists = [group.get("params") for group in groups]
    if not lists or not all(isinstance(names, list) and all(type(name) is str for name in names) for names in lists):
        return None
    return {name for names in lists for name in names}


def _check_entry(name: str, value: Any, kind: type, file: Path) -> None:
    if kind is int:
        least = 1 if name == "global_batch" else 0
        if type(value) is not int or not least <= value <= LARGEST_COUNT:
            raise ValueError(
                f"{file}: {name} must be a whole number from {least} to {LARGEST_COUNT}, got {_short(value)}"
            )
    elif type(value) is not kind:
        raise ValueError(f"{file}: {name} must be {_KINDS[kind]}, got {_short(value)}")


def _check_part_of_model(name: str, part: Mapping[str, Any], model: Mapping[str, Any], file: Path) -> None:
    for key, tensor in model.items():
        if type(key) is not str or not isinstance(tensor, Tensor):
            raise ValueError(f"{file}: model must hold tensors by name, got {_short(tensor)} for {_short(key)}")
    for key, tensor in part.items():
        if key not in model:
            raise ValueError(f"{file}: {name} has {_short(key)}, which its model has not")
        shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        if shape != tuple(model[key].shape):
            raise ValueError(f"{file}: {key} is {shape} in {name}, {tuple(model[key].shape)} in its model")


def _short(value: Any) -> str:
    text = f"a tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else _text(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _text(value: Any) -> str:
    try:
        return repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, endless depth
        return f"a {type(value).__name__}"
