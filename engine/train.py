"""The training loop of every stage: takes ready objects, parses nothing, writes through the callbacks it is given.

A step is `accum_iter` passes over a batch each, one clip, one AdamW update, one EMA update. Everything random in a pass
comes from a generator keyed by (seed, step, pass, rank), so a run that stops and continues makes the draws of one that
did not: N + N steps are 2N steps, bit for bit on a CPU. Dropout has no generator of its own: PyTorch's global one is
re-seeded by the same key before each pass.

Left out: gradient scaling (bf16 needs none), dynamic batch sizes, several data sources.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engine.inputs import MakeInputs, StepInputs
from engine.meter import Meter
from engine.optim import LrSchedule, clip_gradients, set_lr
from engine.parallel import gradient_sync
from models.diffloss import DiffusionDraws
from models.masking import TokenMask
from models.structmar import StructMAR
from util.distributed import DistInfo, any_rank, reduce_mean
from util.ema import Ema
from util.logging import MetricWriter, progress
from util.rng import derive_seed, generator

logger = logging.getLogger(__name__)

SIGNAL_CHECK_FREQ = 10  # steps between the collective checks for a signal, with more than one process


@dataclass(frozen=True)
class TrainConfig:
    """Lengths and intervals; an interval of 0 means never. max_steps: None for no bound."""

    seed: int
    epochs: int
    max_steps: int | None = None
    accum_iter: int = 1
    precision: str = "fp32"
    grad_clip: float = 3.0
    mask_ratio_min: float = 0.7
    log_freq: int = 20
    save_epochs: int = 5
    save_steps: int = 0
    preview_epochs: int = 0
    preview_steps: int = 0


@dataclass(frozen=True)
class Position:
    """How far a stage has come. step: optimizer steps done. batch: batches of `epoch` done, on every process."""

    epoch: int = 0
    step: int = 0
    batch: int = 0


class Batches(Protocol):
    """Batches of one process. The same number on every process, the same ones for the same epoch."""

    def __len__(self) -> int: ...

    def of_epoch(self, epoch: int, start_batch: int) -> Iterator[Any]: ...


class StopFlag(Protocol):
    """signum: the signal that asked this process to stop, or None."""

    @property
    def signum(self) -> int | None: ...


@dataclass(frozen=True)
class Learner:
    """What a step changes. model: as built (perhaps sharded). wrapped: what is called, DDP around it or itself."""

    model: StructMAR
    wrapped: nn.Module
    trainable: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: Ema


@dataclass(frozen=True)
class TrainingRun:
    """A stage, ready to go. save writes checkpoint-last.pth; preview samples images, evaluate scores some
    (every process calls all three)."""

    config: TrainConfig
    learner: Learner
    schedule: LrSchedule
    batches: Batches
    make_inputs: MakeInputs
    dist: DistInfo
    save: Callable[[Position], None]
    preview: Callable[[int, MetricWriter], None] | None = None
    evaluate: Callable[[int, MetricWriter], None] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return len(self.batches) // self.config.accum_iter

    @property
    def total_steps(self) -> int:
        steps = self.config.epochs * self.steps_per_epoch
        return steps if self.config.max_steps is None else min(steps, self.config.max_steps)


def train(run: TrainingRun, start: Position, writer: MetricWriter, stop: StopFlag) -> int | None:
    """Trains from `start` to the end, or until `stop`. Saves at the end either way. Returns the signal that stopped it.

    Raises ValueError if an epoch has no full step, FloatingPointError where a loss or gradient is not finite.
    """
    if run.steps_per_epoch < 1:
        raise ValueError(f"an epoch has {len(run.batches)} batches, fewer than accum_iter={run.config.accum_iter}")
    left_over = len(run.batches) % run.config.accum_iter
    if left_over:
        logger.info(
            "the last %d of %d batches of each epoch do not fill a step and are left out", left_over, len(run.batches)
        )
    loop = _Loop(run, start, writer, stop)
    return loop.run_epochs()


class _Loop:
    """Where the loop stands: position, meter, clock."""

    def __init__(self, run: TrainingRun, start: Position, writer: MetricWriter, stop: StopFlag) -> None:
        self.run, self.position, self.writer, self.stop = run, start, writer, stop
        self.meter = Meter(run.dist.device, run.dist.rank)
        self.saved_step: int | None = None
        self.clock = time.perf_counter()
        self.num_images = 0

    def run_epochs(self) -> int | None:
        run, signum = self.run, None
        run.learner.model.train()
        bar: Any = progress(total=run.total_steps, initial=self.position.step, unit="step", rank=run.dist.rank)
        with bar:
            while not self.is_finished() and signum is None:
                signum = self.run_epoch(bar)
        if self.position.step % run.config.log_freq and self.num_images:
            self.log()
        if self.saved_step != self.position.step:
            self.save()
        return signum

    def is_finished(self) -> bool:
        return self.position.step >= self.run.total_steps

    def run_epoch(self, bar: Any) -> int | None:
        """One epoch, or what is left of it. Returns the signal that cut it short."""
        config, epoch = self.run.config, self.position.epoch
        batches = self.run.batches.of_epoch(epoch, self.position.batch)
        while self.position.epoch == epoch and not self.is_finished():
            micro_batches = islice(batches, config.accum_iter)
            self.num_images += take_step(self.run, self.position, micro_batches, self.meter)
            self.position = advance(self.position, config.accum_iter, self.run.steps_per_epoch)
            bar.update(1)
            self.after_step(is_epoch_end=self.position.epoch != epoch)
            if (signum := self.asked_to_stop()) is not None:
                return signum
        return None

    def after_step(self, is_epoch_end: bool) -> None:
        config, step, epoch = self.run.config, self.position.step, self.position.epoch
        if _is_due(step, config.log_freq):
            self.log()
        if _is_due(step, config.save_steps) or (is_epoch_end and _is_due(epoch, config.save_epochs)):
            self.save()
        is_preview_epoch = is_epoch_end and _is_due(epoch, config.preview_epochs)
        rounds = [self.run.preview] if _is_due(step, config.preview_steps) or is_preview_epoch else []
        rounds += [self.run.evaluate] if is_preview_epoch else []
        for shown in rounds:
            if shown is not None:
                self.meter.check()
                shown(step, self.writer)
                self.run.learner.model.train()

    def asked_to_stop(self) -> int | None:
        """The signal, agreed on by all processes (torchrun passes it to each, not at the same step)."""
        if self.run.dist.world_size == 1:
            return self.stop.signum
        if self.position.step % SIGNAL_CHECK_FREQ:
            return None
        signum = self.stop.signum
        return (signum or DEFAULT_SIGNUM) if any_rank(signum is not None) else None

    def log(self) -> None:
        loss, grad_norm = self.meter.read()
        now = time.perf_counter()
        rate = self.num_images * self.run.dist.world_size / max(now - self.clock, 1e-9)
        self.clock, self.num_images = now, 0
        means = reduce_mean({"loss": loss, "grad_norm": grad_norm})
        position, lr = self.position, self.run.learner.optimizer.param_groups[0]["lr"]
        epoch = position.epoch + position.batch / (self.run.steps_per_epoch * self.run.config.accum_iter)
        self.writer.scalars(position.step, {**means, "lr": lr, "epoch": epoch, "images_per_second": rate})
        logger.info(
            "step %d  epoch %.2f  loss %.4f  grad norm %.3f  lr %.2e  %.1f images/s",
            position.step, epoch, means["loss"], means["grad_norm"], lr, rate,
        )  # fmt: skip

    def save(self) -> None:
        self.meter.check()
        self.run.save(self.position)
        self.saved_step = self.position.step


DEFAULT_SIGNUM = 15  # SIGTERM, for a process that hears of the signal from another one


def take_step(run: TrainingRun, position: Position, micro_batches: Iterator[Any], meter: Meter) -> int:
    """One optimizer step. Returns how many images this process saw."""
    config, learner, rank = run.config, run.learner, run.dist.rank
    step_of_epoch = position.batch // config.accum_iter
    set_lr(learner.optimizer, run.schedule.at(position.epoch + (step_of_epoch + 1) / run.steps_per_epoch))
    num_images = 0
    for micro, batch in enumerate(micro_batches):
        draws = generator(config.seed, "train", position.step, micro, rank)
        inputs = run.make_inputs(batch, position.epoch, draws)
        mask, diffusion = learner.model.sample_training_draws(len(inputs), draws, config.mask_ratio_min)
        torch.manual_seed(derive_seed(config.seed, "dropout", position.step, micro, rank))
        is_last = micro + 1 == config.accum_iter
        loss = backward_pass(learner.wrapped, inputs, mask, diffusion, config.precision, config.accum_iter, is_last)
        meter.watch("latents", inputs.latents, position.step)
        if inputs.text is not None:
            meter.watch("text", inputs.text.pooled, position.step)
        meter.add_loss(loss, position.step)
        num_images += len(inputs)
    assert micro + 1 == config.accum_iter, "an epoch's batches ended in the middle of a step"
    meter.add_norm(clip_gradients(learner.trainable.values(), config.grad_clip), position.step)
    learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)
    learner.ema.update()
    return num_images


def backward_pass(
    wrapped: nn.Module,
    inputs: StepInputs,
    mask: TokenMask,
    draws: DiffusionDraws,
    precision: str,
    accum_iter: int,
    is_last: bool,
) -> Tensor:
    """Adds this pass's share of a step's gradients. Processes exchange them if `is_last`. Returns the loss."""
    device = inputs.latents.device
    with gradient_sync(wrapped, is_last):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = wrapped(
                inputs.latents,
                mask.to(device),
                draws.to(device),
                labels=inputs.labels,
                text=inputs.text,
                layout=inputs.layout,
            )
        (loss / accum_iter).backward()
    return loss.detach()


def advance(position: Position, accum_iter: int, steps_per_epoch: int) -> Position:
    """The position after one more step: the next epoch's start once the epoch's steps are done."""
    batch = position.batch + accum_iter
    if batch >= steps_per_epoch * accum_iter:
        return Position(position.epoch + 1, position.step + 1, 0)
    return replace(position, step=position.step + 1, batch=batch)


def _is_due(count: int, interval: int) -> bool:
    return interval > 0 and count % interval == 0
