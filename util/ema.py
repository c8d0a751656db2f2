"""Exponential moving average of parameters, in float32: shadow <- rate * shadow + (1 - rate) * parameter.

Only the parameters given are averaged: what is frozen needs no shadow. Works on DTensor parameters (FSDP) shard by
shard; build it after the model has been sharded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Parameter


class Ema:
    """The moving average of `named_parameters` with `rate` in [0, 1]; it starts at their present values."""

    def __init__(self, named_parameters: Mapping[str, Parameter], rate: float) -> None:
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"EMA rate must lie in [0, 1], got {rate}")
        self.rate = rate
        self._parameters = dict(named_parameters)
        self._shadows = {name: p.detach().clone().float() for name, p in self._parameters.items()}
        self._is_applied = False

    @torch.no_grad()
    def update(self) -> None:
        """One step towards the parameters' present values."""
        self._refuse_while_applied("update")
        if not self._shadows:
            return
        shadows = [_local(shadow) for shadow in self._shadows.values()]
        values = [_local(parameter.detach()).float() for parameter in self._parameters.values()]
        torch._foreach_lerp_(shadows, values, 1.0 - self.rate)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name: the live float32 tensors (DTensors where the parameters are), not copies."""
        return dict(self._shadows)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies averages in. Whole tensors are distributed where the parameter is sharded.

        Raises ValueError naming missing and unexpected parameters, or both shapes.
        """
        self._refuse_while_applied("load_state_dict")
        missing, unexpected = sorted(self._shadows.keys() - state.keys()), sorted(state.keys() - self._shadows.keys())
        if missing or unexpected:
            raise ValueError(f"EMA state does not fit: missing {_names(missing)}; unexpected {_names(unexpected)}")
        for name, shadow in self._shadows.items():
            if state[name].shape != shadow.shape:
                found, expected = tuple(state[name].shape), tuple(shadow.shape)
                raise ValueError(f"EMA state of {name} has shape {found}, the parameter has {expected}")
        for name, shadow in self._shadows.items():
            shadow.copy_(_like(state[name], shadow))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """In the block the parameters hold the averages (in place); afterwards, bit for bit, what they held before."""
        self._refuse_while_applied("applied")
        kept = [parameter.detach().clone() for parameter in self._parameters.values()]
        self._is_applied = True
        try:
            self._fill(list(self._shadows.values()))
            yield
        finally:
            self._fill(kept)
            self._is_applied = False

    @torch.no_grad()
    def _fill(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters.values(), values, strict=True):
            parameter.copy_(value)

    def _refuse_while_applied(self, what: str) -> None:
        if self._is_applied:
            raise RuntimeError(f"Ema.{what} inside `with ema.applied()`: the parameters hold the averages now")


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(value: Tensor, shadow: Tensor) -> Tensor:
    if isinstance(shadow, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value.to(shadow.device, shadow.dtype), shadow.device_mesh, shadow.placements)
    return value


def _names(names: list[str]) -> str:
    shown = ", ".join(names[:8]) or "none"
    return shown if len(names) <= 8 else f"{shown}, ... ({len(names)} in all)"
