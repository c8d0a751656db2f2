"""What every loader of weights asks of a tensor: floating point where the model has it, and finite.

Weights that became NaN elsewhere give black pictures, and integers load into any layer, without a word.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def tensor_problem(name: str, value: Any, wanted: Tensor | None = None) -> str | None:
    """What is wrong with a file's entry, in words that begin with its name; None if nothing is. One pass, no copy.

    wanted: what it is loaded into; None stands for a weight. Counters and positions may be whole numbers where they are
    such there. Shapes are not looked at. Tensors on the meta device have no values to look at.
    """
    if not isinstance(value, Tensor):
        return f"{name} is a {type(value).__name__}, not a tensor"
    if wanted is not None and not wanted.is_floating_point():
        return None if _is_whole_numbers(value) else f"{name} is {_kind(value)}, not whole numbers"
    if not value.is_floating_point():
        return f"{name} is {_kind(value)}, not floating point"
    return None if is_finite(value) else f"{name} is not finite (it has NaN or infinite values)"


def is_finite(tensor: Tensor) -> bool:
    """Of floating point. Least and largest tell, and are many times faster than `isfinite`, which makes a mask."""
    if tensor.is_meta or not tensor.numel():
        return True
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # there is no minimum of float8
    return bool(torch.isfinite(torch.stack(torch.aminmax(wide))).all())


def _is_whole_numbers(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
