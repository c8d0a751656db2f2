"""Exponential moving average of parameters, in float32: shadow <- rate * shadow + (1 - rate) * parameter.

With a warm-up, the n-th update (from 0) has the rate min(rate, (1 + n) / (10 + n)): a short run's average follows what
was trained instead of standing at the start. It depends on n alone, so that a run continues exactly.

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

    def __init__(self, named_parameters: Mapping[str, Parameter], rate: float, has_warmup: bool = False) -> None:
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"EMA rate must lie in [0, 1], got {rate}")
        self.rate = rate
        self.has_warmup = has_warmup
        self._parameters = dict(named_parameters)
        self._shadows = {name: p.detach().clone().float() for name, p in self._parameters.items()}
        self._is_applied = False

    @torch.no_grad()
    def update(self, done: int | None = None) -> None:
        """One step towards the parameters' present values. done: how many steps were taken before; a warm-up asks."""
        self._refuse_while_applied("update")
        assert done is not None or not self.has_warmup, "a warm-up counts updates"
        if not self._shadows:
            return
        shadows = [_local(shadow) for shadow in self._shadows.values()]
        values = [_local(parameter.detach()).float() for parameter in self._parameters.values()]
        torch._foreach_lerp_(shadows, values, 1.0 - self.rate_at(done or 0))

    def rate_at(self, done: int) -> float:
        """The rate of the update after `done` others."""
        return min(self.rate, (1 + done) / (10 + done)) if self.has_warmup else self.rate

    def start_share(self, updates: int) -> float:
        """How much of the average is still what it started from, after so many updates; below a thousandth, 0."""
        share = 1.0
        for done in range(updates):
            share *= self.rate_at(done)
            if share < 1e-3:
                return 0.0
        return share

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
