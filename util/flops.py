"""FLOPs of whatever runs, counted operation by operation while it runs: new code is counted without being asked.

One multiply-add is two FLOPs, by the formulas of `torch.utils.flop_counter`, which lacks the CPU's fused attention
(its backward pass computes the logits again) and its linears on packed weights: added here. Element-wise work is none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

Result = TypeVar("Result")
aten = torch.ops.aten


def _attention(query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    """[B, H, n, d] and [B, H, m, d]: the products with keys and with values."""
    return 4 * query.numel() * key.shape[2]


def _attention_gradients(_gradient: Tensor, query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    """The logits once more, and four products for the gradients."""
    return 10 * query.numel() * key.shape[2]


def _packed_linear(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """[..., i] and [o, i]."""
    return 2 * x.numel() * weight.shape[0]


FORMULAS: dict[Any, Callable[..., int]] = flop_registry | {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_gradients,
    torch.ops.mkldnn._linear_pointwise: _packed_linear,
}


class FlopCounter(TorchDispatchMode):
    """flops: of all operations inside the context so far.

    On the meta device only shapes matter. Its kernels are slow, so each runs once for the same shapes: a second block
    like the first costs little time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_functional(func) and _are_meta((*args, *kwargs.values())):
            names = {name: _frozen(value) for name, value in kwargs.items()}
            made, flops = _result_on_meta(func, *map(_frozen, args), **names)
            self.flops += flops
            return _thawed(made)
        result = func(*args, **kwargs)
        self.flops += _flops_of(func, args, kwargs, result)
        return result


def count_flops(run: Callable[[], Result]) -> tuple[Result, int]:
    """Runs once; what it returned, and its FLOPs."""
    with FlopCounter() as counter:
        result = run()
    return result, counter.flops


def _flops_of(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    formula = FORMULAS.get(func.overloadpacket)
    return 0 if formula is None else formula(*args, **kwargs, out_val=result)


@cache
def _is_functional(func: Any) -> bool:
    """Whether its results are new tensors and its arguments stay as they are."""
    return not func.is_view and not func._schema.is_mutable


def _are_meta(values: tuple[Any, ...]) -> bool:
    """Whether there are tensors, all of them on the meta device."""
    found = False
    for value in values:
        for each in value if isinstance(value, list | tuple) else (value,):
            if isinstance(each, Tensor):
                if not each.is_meta:
                    return False
                found = True
    return found


class _Shape(NamedTuple):
    """A tensor of the meta device, as a value."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


def _frozen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Shape(value.shape, value.stride(), value.dtype)
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _thawed(value: Any) -> Any:
    if isinstance(value, _Shape):
        return torch.empty_strided(value.sizes, value.strides, dtype=value.dtype, device="meta")
    return tuple(map(_thawed, value)) if isinstance(value, tuple) else value


@lru_cache(maxsize=4096, typed=True)
def _result_on_meta(func: Any, *frozen_args: Any, **frozen_kwargs: Any) -> tuple[Any, int]:
    """(what the operation gives, frozen; its FLOPs). typed: 1 and 1.0 give results of different dtypes."""
    args = tuple(map(_thawed, frozen_args))
    kwargs = {name: _thawed(value) for name, value in frozen_kwargs.items()}
    result = func(*args, **kwargs)
    return _frozen(result), _flops_of(func, args, kwargs, result)
