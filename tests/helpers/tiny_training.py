"""A run of the loop on a tiny model and made-up latents, with everything recorded instead of written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from engine.data.inputs import StepInputs
from engine.train.loop import TrainConfig, TrainingRun, train
from engine.train.optim import LrSchedule, build_optimizer
from engine.train.state import Position, TrainState
from engine.train.supervised import SupervisedStep
from tests.helpers.training import CPU, tiny_inputs, tiny_model
from util.ema import Ema
from util.logging import MetricWriter


@dataclass
class FakeBatches:
    """Batches are their own inputs."""

    inputs: list[StepInputs]

    global_batch: int = 4

    @property
    def num_images(self) -> int:
        return self.global_batch * len(self.inputs)

    def of_epoch(self, epoch: int, start: int) -> Iterator[StepInputs]:
        return iter(self.inputs[start // self.global_batch :])


@dataclass
class Stop:
    signum: int | None = None


@dataclass
class Tiny:
    """A run with everything recorded instead of written."""

    run: TrainingRun
    saved: list[Position] = field(default_factory=list)
    previews: list[int] = field(default_factory=list)

    def train(self, start: Position | None = None, stop: Stop | None = None, folder: Any = None) -> int | None:
        with MetricWriter(folder) as writer:
            return train(self.run, start or Position(), writer, stop or Stop())

    def train_on(self, start: Position, folder: Any) -> int | None:
        """As a run that continues from a checkpoint of `start`."""
        with MetricWriter(folder, resume_step=start.step) as writer:
            return train(self.run, start, writer, Stop())


def tiny_run(mode: str = "full", num_batches: int = 4, lr: float = 1e-3, **config: Any) -> Tiny:
    model = tiny_model(mode)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    state = TrainState(model, model, trainable, build_optimizer(trainable, lr, 0.02), Ema(trainable, 0.9))
    settings = TrainConfig(**({"seed": 1, "epochs": 2, "log_freq": 1, "save_epochs": 1} | config))
    tiny = Tiny(
        TrainingRun(
            settings,
            state,
            LrSchedule(lr, 0.0, 0.0, settings.epochs, "constant"),
            FakeBatches([tiny_inputs(4, seed) for seed in range(num_batches)]),
            SupervisedStep(settings, state, lambda batch, epoch, draws: batch, CPU),
            CPU,
            lambda position: None,
        )
    )
    tiny.run = replace(tiny.run, save=tiny.saved.append, preview=lambda step, writer: tiny.previews.append(step))
    return tiny
