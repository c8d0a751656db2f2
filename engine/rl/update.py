"""What the steps of stage 3 share: an optimizer step that leaves out gradients which are not finite, and notes."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.train.optim import clip_gradients
from engine.train.state import TrainState
from util.distributed import DistInfo, any_rank

logger = logging.getLogger(__name__)

MAX_SKIPPED = 10  # optimizer steps in a row without a finite gradient
SECONDS = ("rollout_seconds", "update_seconds")  # not in checkpoints: two equal runs write equal files


class OptimizerUpdate:
    """Clips the gradients that the passes of a step left, and takes one optimizer and one EMA step. Where a gradient is
    not finite on one process, all leave the step out."""

    def __init__(self, state: TrainState, grad_clip: float, dist: DistInfo) -> None:
        self.state, self.grad_clip, self.dist = state, grad_clip, dist
        self.skipped_in_a_row = 0

    def __call__(self, step: int) -> dict[str, Tensor | float]:
        """What is to be noted. Raises FloatingPointError after `MAX_SKIPPED` steps in a row that were left out."""
        state = self.state
        norm = clip_gradients(state.trainable.values(), self.grad_clip)
        is_bad = any_rank(not bool(torch.isfinite(norm)))
        noted: dict[str, Tensor | float] = {"skipped": float(is_bad)}
        if is_bad:
            self._skip(step)
        else:
            noted["grad_norm"] = norm
            self.skipped_in_a_row = 0
            state.optimizer.step()
            state.ema.update(step)
        state.optimizer.zero_grad(set_to_none=True)
        return noted

    def _skip(self, step: int) -> None:
        self.skipped_in_a_row += 1
        logger.warning("step %d: the gradient is not finite, the optimizer step is left out", step)
        if self.skipped_in_a_row >= MAX_SKIPPED:
            raise FloatingPointError(
                f"the gradient was not finite in {MAX_SKIPPED} optimizer steps in a row, the last at step {step} "
                f"(rank {self.dist.rank}): lower --lr, or train in --precision fp32"
            )


class StepNotes:
    """Values by name, noted while a step is taken; they count once the step is whole. shown: names that every `read`
    has, NaN where nothing was noted."""

    def __init__(self, shown: Sequence[str]) -> None:
        self.shown = shown
        self._values: defaultdict[str, list[float]] = defaultdict(list)  # since the last `read`, of whole steps
        self._noted: list[tuple[str, Tensor]] = []  # of the step that is being taken

    def begin(self) -> None:
        """A step begins: what one that failed noted is forgotten."""
        self._noted.clear()

    def note(self, values: Mapping[str, Tensor | float]) -> None:
        for name, value in values.items():
            self._noted.append((name, torch.as_tensor(value, dtype=torch.float64).detach().cpu()))

    def keep(self) -> None:
        """The step is whole: what it noted counts."""
        for name, value in self._noted:
            self._values[name].append(float(value))
        self._noted.clear()

    def read(self) -> dict[str, float]:
        """The mean of each since the last read."""
        self.keep()
        means = {name: float(torch.tensor(values, dtype=torch.float64).mean()) for name, values in self._values.items()}
        self._values.clear()
        return {**dict.fromkeys(self.shown, math.nan), **means}

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint; `restore` takes them back."""
        return {name: list(values) for name, values in self._values.items() if name not in SECONDS}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._values.update({name: list(values) for name, values in state.items()})
