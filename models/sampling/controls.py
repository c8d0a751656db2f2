"""What steers the conditions while sampling goes on: a hook that is asked before every iteration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from models.conditioning import Conditions


class Controls(Protocol):
    """Conditions by iteration."""

    def at(self, iteration: int, visible: float, conditions: Conditions) -> Conditions:
        """The fully conditioned branch's conditions in this iteration, given those of the run, of the whole batch; the
        guidance branches without text or layout stay as they are. visible: the share of the image's units that are
        known before this iteration. Returning an object that was returned in the iteration before saves preparing it
        again."""

    def observes(self, iteration: int) -> bool:
        """Whether `observe` wants the maps of this iteration."""

    def observe(self, iteration: int, maps: Tensor, rows: Sequence[int] | None) -> None:
        """After an iteration: what the image looked at in the caption (`models/attention_maps.py`), [b, L, T] of these
        rows of the batch (None: all), over the trunk's L tokens and the caption's, the null token first; T may be
        padded."""


class NoControls:
    """The conditions of the run, in every iteration."""

    def observes(self, iteration: int) -> bool:
        return False

    def observe(self, iteration: int, maps: Tensor, rows: Sequence[int] | None) -> None:
        """Not asked for."""

    def at(self, iteration: int, visible: float, conditions: Conditions) -> Conditions:
        return conditions
