"""What steers the conditions while sampling goes on: a hook that is asked before every iteration."""

from __future__ import annotations

from typing import Protocol

from models.conditioning import Conditions


class Controls(Protocol):
    """Conditions by iteration."""

    def at(self, iteration: int, visible: float, conditions: Conditions) -> Conditions:
        """The fully conditioned branch's conditions in this iteration, given those of the run, of the whole batch; the
        guidance branches without text or layout stay as they are. visible: the share of the image's units that are
        known before this iteration. Returning an object that was returned in the iteration before saves preparing it
        again."""


class NoControls:
    """The conditions of the run, in every iteration."""

    def at(self, iteration: int, visible: float, conditions: Conditions) -> Conditions:
        return conditions
