"""Equal contents are equal bytes: the one form in which a plain value is pickled.

Pickle writes an object that it has met before as a reference to the first one. So the bytes of a dictionary depend on
which equal strings are one object, which tensors are views of one storage, and on the order of its keys; all of these
change when a file is read and written again. Here equal strings become one object, everything else one of its own, and
keys are sorted.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

MAX_DEPTH = 50
_PLAIN_LEAVES = (type(None), bool, int, float)


def canonical(value: Any, where: str = "checkpoint") -> Any:
    """A copy of nested dictionaries, lists and tuples of plain values and tensors, whose pickle is a function of what
    they hold. Tensors come to the CPU, contiguous, each with a storage of its own (copied only where they have none).

    Raises ValueError naming the entry if something is neither a tensor nor a plain value (`weights_only=True` would not
    load it), or lies deeper than MAX_DEPTH.
    """
    return _Canonical().of(value, where, 0)


class _Canonical:
    def __init__(self) -> None:
        self.storages: set[int] = set()

    def of(self, value: Any, where: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError(f"{where[:200]} lies deeper than {MAX_DEPTH} levels")
        if type(value) in (dict, OrderedDict):
            return {self.key(key, where): self.of(value[key], f"{where}[{key!r}]", depth + 1) for key in _sorted(value)}
        if type(value) in (list, tuple):
            entries = [self.of(entry, f"{where}[{index}]", depth + 1) for index, entry in enumerate(value)]
            return entries if type(value) is list else tuple(entries)
        if type(value) is str:
            return sys.intern(value)
        if type(value) is bytes:
            return bytes(bytearray(value))  # an object of its own
        if type(value) in (Tensor, torch.nn.Parameter):
            return self.tensor(value)
        if type(value) in _PLAIN_LEAVES:
            return value
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise ValueError(f"{where} is a {kind}, checkpoints hold plain values and tensors only")

    def key(self, key: Any, where: str) -> str | int:
        if type(key) not in (str, int):
            raise ValueError(f"{where}: key {key!r} is a {type(key).__name__}, checkpoints hold plain values only")
        return sys.intern(key) if type(key) is str else key

    def tensor(self, value: Tensor) -> Tensor:
        own = value.detach().cpu()
        is_whole = own.untyped_storage().nbytes() == own.numel() * own.element_size()
        is_first = own.data_ptr() not in self.storages
        if not (is_whole and is_first and own.numel() and own.stride() == _row_major(own.shape)):
            own = own.clone(memory_format=torch.contiguous_format)
        self.storages.add(own.data_ptr())
        return own


def _sorted(value: dict[Any, Any]) -> list[Any]:
    return sorted(value, key=lambda key: (type(key).__name__, key))


def _row_major(shape: torch.Size) -> tuple[int, ...]:
    """The strides of a tensor in rows; `is_contiguous` would let those of axes of length 1 be anything."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
