"""The step of MARS: drawing and describing in one, so that every expert has a gradient in every step of stage I.

    loss = drawing + caption_weight * describing + choice_weight * choice        (models/mars/losses.py)

Dropped captions come from a generator keyed by (seed, step, pass, rank); the language model has no dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from engine.data.coco import Batch
from engine.train.loop import TrainConfig
from engine.train.meter import Meter
from engine.train.optim import clip_gradients
from engine.train.parallel import gradient_sync
from engine.train.state import Position
from models.mars.losses import Losses, MarsObjective, Pairs
from models.mars.model import Mars
from util.distributed import DistInfo
from util.ema import Ema
from util.rng import generator

MakePairs = Callable[[Batch, int, torch.Generator], Pairs]


@dataclass(frozen=True)
class MarsState:
    """What a step changes. A `Trained` of the loop. objective: as built (perhaps sharded). wrapped: what is called, DDP
    around it or itself. trainable: what the optimizer holds, by the model's names; of the average, all or none."""

    objective: MarsObjective
    wrapped: nn.Module
    trainable: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: Ema

    @property
    def model(self) -> Mars:
        return self.objective.model


@dataclass(frozen=True)
class LossWeights:
    """Of describing and of the choice to draw, beside drawing; 0 leaves a part out, on all processes alike."""

    caption: float
    choice: float


class MarsStep:
    """A `Step` of the loop."""

    def __init__(
        self, config: TrainConfig, state: MarsState, make_pairs: MakePairs, weights: LossWeights, dist: DistInfo
    ) -> None:
        self.config, self.state, self.make_pairs, self.weights, self.dist = config, state, make_pairs, weights, dist
        parts = {"drawing": True, "describing": weights.caption > 0, "choice": weights.choice > 0}
        self.total = Meter(dist.device, dist.rank)
        self.parts = {name: Meter(dist.device, dist.rank) for name, is_there in parts.items() if is_there}

    @property
    def shown(self) -> tuple[str, ...]:
        return ("loss", *self.parts, "grad_norm")

    def take(self, position: Position, micro_batches: Iterator[Any]) -> int:
        config, state, step = self.config, self.state, position.step
        state.objective.train()
        num_images, found = 0, []
        for micro, batch in enumerate(micro_batches):
            rng = generator(config.seed, "train", step, micro, self.dist.rank)
            pairs = self.make_pairs(batch, position.epoch, rng)
            found.append(self.backward(pairs, is_last=micro + 1 == config.accum_iter))
            num_images += len(batch)
        assert len(found) == config.accum_iter, "an epoch's batches ended in the middle of a step"
        for losses in found:
            self.total.add_loss(losses.total.detach(), step)
            for name, meter in self.parts.items():
                meter.add_loss(vars(losses)[name], step)
        self.total.add_norm(clip_gradients(state.trainable.values(), config.grad_clip), step)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.ema.update(step)
        return num_images

    def backward(self, pairs: Pairs, is_last: bool) -> Losses:
        """Adds this pass's share of a step's gradients. Processes exchange them if `is_last`."""
        config, wrapped = self.config, self.state.wrapped
        with gradient_sync(wrapped, is_last):
            with torch.autocast(self.dist.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                losses: Losses = wrapped(pairs, self.weights.caption, self.weights.choice)
            (losses.total / config.accum_iter).backward()
        return losses

    def check(self) -> None:
        self.total.check()

    def read(self) -> dict[str, float]:
        loss, grad_norm = self.total.read()
        return {"loss": loss, **{name: meter.read()[0] for name, meter in self.parts.items()}, "grad_norm": grad_norm}

    def open_interval(self) -> dict[str, Any]:
        return {"total": self.total.state(), **{name: meter.state() for name, meter in self.parts.items()}}

    def reopen(self, interval: Mapping[str, Any]) -> None:
        for name, meter in {"total": self.total, **self.parts}.items():
            if name in interval:  # a part may be new
                meter.restore(interval[name])
