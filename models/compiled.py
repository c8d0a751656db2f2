"""torch.compile, once per function."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


@lru_cache
def compiled(function: Callable[..., Tensor], mode: str) -> Callable[..., Any]:
    """One compiled function for all layers and all numbers of tokens."""
    return torch.compile(function, mode=mode, dynamic=True)
