"""What a run asks of the machine, counted while it runs: FLOPs, bytes that matrix products touch, kernels, host syncs.

FLOPs are those of `util/flops.py`. Bytes are those of every operand and result of a matrix product, as if no cache held
them. A kernel is an operation that is no view. A host sync is an operation that a GPU would have to wait for: a value
read back (`item`, `nonzero`), or a tensor made of the host's numbers (`torch.tensor`, `torch.from_numpy`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from util.flops import FORMULAS, FlopCounter

Result = TypeVar("Result")
aten = torch.ops.aten

READ_BACK = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}
FROM_HOST = {aten.lift_fresh.default}
FREE = {aten.detach.default, aten._unsafe_view.default, aten.alias.default, *FROM_HOST}


@dataclass(frozen=True)
class Counts:
    """See the module's docstring. product_bytes: of matrix products."""

    flops: float
    product_bytes: float
    kernels: int
    syncs: int


class _Operations(FlopCounter):
    def __init__(self) -> None:
        super().__init__()
        self.product_bytes = self.kernels = self.syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.kernels += not func.is_view and func not in FREE
        self.syncs += func in READ_BACK or func in FROM_HOST
        if func.overloadpacket in FORMULAS:
            tensors = (leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor))
            self.product_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


def count(run: Callable[[], Result]) -> tuple[Result, Counts]:
    """Runs once; what it returned, and the counts."""
    with _Operations() as operations:
        result = run()
    return result, Counts(operations.flops, operations.product_bytes, operations.kernels, operations.syncs)
