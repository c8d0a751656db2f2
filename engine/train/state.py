"""What training changes, and how far it has come: the two things that a checkpoint restores.

A stage's length is counted in epochs, its position inside an epoch in images. So a run that continues with another
batch size, number of processes or accumulation sees what is left of the epoch and ends after the same epochs; only its
steps are other ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn

from models.structmar import StructMAR
from util.ema import Ema


@dataclass(frozen=True)
class Position:
    """How far a stage has come. step: optimizer steps done, of whatever size. images: of `epoch` done, by all processes
    together; captions, where an epoch visits every caption."""

    epoch: int = 0
    step: int = 0
    images: int = 0


@dataclass(frozen=True)
class Course:
    """How long a stage is. images: of an epoch. images_per_step: of all processes and passes together. max_steps: ends
    it before its epochs do; steps of all sizes count alike. Images that do not fill a step end their epoch unseen."""

    images: int
    images_per_step: int
    epochs: int
    max_steps: int | None = None

    @property
    def steps_per_epoch(self) -> int:
        return self.images // self.images_per_step

    def entered(self, position: Position) -> Position:
        """`position`, or the next epoch's start if what is left of its epoch fills no step."""
        if position.images + self.images_per_step <= self.images:
            return position
        return Position(position.epoch + 1, position.step)

    def after_step(self, position: Position) -> Position:
        images = position.images + self.images_per_step
        return self.entered(replace(position, step=position.step + 1, images=images))

    def epochs_done(self, position: Position) -> float:
        """The position in epochs, what the learning rate follows."""
        return position.epoch + min(1.0, position.images / (self.steps_per_epoch * self.images_per_step))

    def epochs_after(self, position: Position) -> float:
        """Where the next step ends."""
        return self.epochs_done(self.after_step(position))

    def steps_left(self, position: Position) -> int:
        if position.epoch >= self.epochs:
            return 0
        of_epoch = (self.images - position.images) // self.images_per_step
        steps = of_epoch + (self.epochs - position.epoch - 1) * self.steps_per_epoch
        return steps if self.max_steps is None else max(0, min(steps, self.max_steps - position.step))

    def is_finished(self, position: Position) -> bool:
        return self.steps_left(position) == 0


class Trained(Protocol):
    """What the loop itself asks of what it trains: a `TrainState`, or another model's."""

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    @property
    def ema(self) -> Ema: ...


@dataclass(frozen=True)
class TrainState:
    """What a step changes. model: as built (perhaps sharded). wrapped: what is called, DDP around it or itself.
    trainable: the parameters that the optimizer and the average hold, by name."""

    model: StructMAR
    wrapped: nn.Module
    trainable: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: Ema
