"""What training changes, and how far it has come: the two things that a checkpoint restores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from models.structmar import StructMAR
from util.ema import Ema


@dataclass(frozen=True)
class Position:
    """How far a stage has come. step: optimizer steps done. batch: batches of `epoch` done, on every process."""

    epoch: int = 0
    step: int = 0
    batch: int = 0


@dataclass(frozen=True)
class TrainState:
    """What a step changes. model: as built (perhaps sharded). wrapped: what is called, DDP around it or itself.
    trainable: the parameters that the optimizer and the average hold, by name."""

    model: StructMAR
    wrapped: nn.Module
    trainable: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: Ema
