"""Watches for over-optimisation: the reward rises while a detector that is not the reward sees worse images.

A held-out evaluation is bad when its AP50 lies more than `drop` below the best one so far, while the mean reward since
the evaluation before is higher than it was at that best. After `patience` bad evaluations in a row the guard speaks.
A reward that falls together with AP50 is a failing run, not a fooled detector: that is not what this guard is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

ROUNDING = 1e-9  # .60 - .58 is a little more than .02


@dataclass(frozen=True)
class GuardState:
    """What the guard remembers, plain values. best_reward: the mean reward that belongs to the best evaluation, None
    until the first update. num_bad: bad evaluations in a row, up to now."""

    best_step: int | None = None
    best_ap50: float | None = None
    best_reward: float | None = None
    num_bad: int = 0


class OverOptimisationGuard:
    """mode: one of GUARD_MODES. `off` never speaks, `warn` and `stop` do; to stop is up to the caller (see `stops`).
    drop: in AP50 as a share in [0, 1], .02 is two points. patience: bad evaluations in a row, at least 1.
    way_back: the file that holds a step's weights, in words for the message. brake: the flag that holds the policy near
    its start."""

    def __init__(
        self,
        mode: str,
        drop: float = 0.02,
        patience: int = 2,
        way_back: Callable[[int], str] | None = None,
        brake: str = "--kl_coef",
    ) -> None:
        self.mode = mode
        self.drop = drop
        self.patience = patience
        self.way_back = way_back
        self.brake = brake
        self._state = GuardState()

    @property
    def stops(self) -> bool:
        """Whether a message of this guard ends the run."""
        return self.mode == "stop"

    def update(self, step: int, mean_reward: float | None, ap50: float) -> str | None:
        """Takes one held-out evaluation; returns a message for the user, or None while all is well.

        mean_reward: of the rollouts since the previous evaluation. It is None before the first update, where there are
        no rollouts yet; the first mean reward that follows then stands for this evaluation too, because those rollouts
        were sampled from the same weights. ap50: share in [0, 1].
        Raises ValueError if mean_reward is not finite or ap50 not in [0, 1].
        """
        if not 0 <= ap50 <= 1:  # also refuses NaN
            raise ValueError(f"step {step}: the held-out AP50 must lie within 0 and 1, got {ap50}")
        if mean_reward is not None and not math.isfinite(mean_reward):
            raise ValueError(f"step {step}: the mean reward must be finite, got {mean_reward}")
        self._state = advance(self._state, step, mean_reward, ap50, self.drop)
        if self.mode == "off" or self._state.num_bad < self.patience or mean_reward is None:
            return None
        assert self._state.best_step is not None, "a bad evaluation has a better one before it"
        way_back = "" if self.way_back is None else f" ({self.way_back(self._state.best_step)})"
        return _message(self._state, step, mean_reward, ap50, way_back, self.brake)

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint; `restore` takes them back."""
        return asdict(self._state)

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from `state()`. Raises ValueError naming the fields if one is missing or unknown."""
        known = {field.name for field in fields(GuardState)}
        if known != set(state):
            missing, unknown = sorted(known - set(state)), sorted(set(state) - known)
            raise ValueError(f"guard state: missing fields {missing}, unknown fields {unknown}")
        self._state = GuardState(**state)


def advance(state: GuardState, step: int, mean_reward: float | None, ap50: float, drop: float) -> GuardState:
    """The state after one more evaluation. A tie with the best keeps the earlier one."""
    if state.best_ap50 is None or ap50 > state.best_ap50:
        return GuardState(step, ap50, mean_reward)
    best_reward = mean_reward if state.best_reward is None else state.best_reward
    is_higher = mean_reward is not None and best_reward is not None and mean_reward > best_reward
    is_bad = is_higher and state.best_ap50 - ap50 > drop + ROUNDING
    return GuardState(state.best_step, state.best_ap50, best_reward, state.num_bad + 1 if is_bad else 0)


def _message(state: GuardState, step: int, mean_reward: float, ap50: float, way_back: str, brake: str) -> str:
    assert state.best_ap50 is not None, "a bad evaluation has a better one before it"
    return (
        f"step {step}: the policy may be fooling the reward. Held-out AP50 is {100 * ap50:.1f} %, after "
        f"{100 * state.best_ap50:.1f} % at step {state.best_step}, while the mean reward rose from "
        f"{state.best_reward:.4f} to {mean_reward:.4f} (bad evaluations in a row: {state.num_bad}). "
        f"Go back to step {state.best_step}{way_back}, raise {brake} or lower --lr."
    )
