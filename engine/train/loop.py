"""The training loop of every stage: takes ready objects, parses nothing, writes through the callbacks it is given.

What a step does is a `Step`: on given images `supervised.py`, in stage 3 engine/rl/step.py and its neighbours.
Everything random in it comes from generators keyed by (seed, step, pass, rank), so a run that stops and continues makes
the random choices of one that did not: N + N steps are 2N steps, bit for bit on a CPU.

Left out: gradient scaling (bf16 needs none), dynamic batch sizes, several data sources.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from engine.train.optim import LrSchedule, set_lr
from engine.train.profile import StepProfiler
from engine.train.state import Course, Position, Trained
from util.distributed import DistInfo, any_rank, failing_together, reduce_mean
from util.failures import RanksFailed, one_line
from util.logging import MetricWriter, progress
from util.run_info import memory_gb

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainConfig:
    """Lengths and intervals; an interval of 0 means never. max_steps: None for no bound. With eval_steps the start is
    evaluated too. mask_schedule: None for the head's own. signal_steps: steps between the collective checks for a
    signal, with more than one process."""

    seed: int
    epochs: int
    max_steps: int | None = None
    accum_iter: int = 1
    precision: str = "fp32"
    grad_clip: float = 3.0
    mask_ratio_min: float = 0.7
    mask_schedule: str | None = None
    log_freq: int = 20
    save_epochs: int = 5
    save_steps: int = 0
    keep_steps: int = 0
    preview_epochs: int = 0
    preview_steps: int = 0
    eval_steps: int = 0
    signal_steps: int = 10


class Batches(Protocol):
    """Batches of one process. num_images: of an epoch. global_batch: images of a batch, of all processes together."""

    @property
    def num_images(self) -> int: ...

    @property
    def global_batch(self) -> int: ...

    def of_epoch(self, epoch: int, start: int) -> Iterator[Any]:
        """What is left after the epoch's first `start` images. The same order for the same epoch, however many
        processes share it; the same number of batches on each."""


class StopFlag(Protocol):
    """signum: the signal that asked this process to stop, or None."""

    @property
    def signum(self) -> int | None: ...


class Step(Protocol):
    """What one step does with its batches. shown: the metrics of a log line.

    take: one step; returns how many images this process saw. check: raises FloatingPointError where a value was not
    finite. read: the metrics since the last read, the same names on every process; checks first. open_interval: what
    has been noted since then, plain values for a checkpoint; reopen takes them back, so that the first log line of a
    continued run covers the same steps. What a step notes counts once the step is whole.
    """

    @property
    def shown(self) -> tuple[str, ...]: ...

    def take(self, position: Position, micro_batches: Iterator[Any]) -> int: ...

    def check(self) -> None: ...

    def read(self) -> dict[str, float]: ...

    def open_interval(self) -> dict[str, Any]: ...

    def reopen(self, interval: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class TrainingRun:
    """A stage, ready to go. save writes checkpoint-last.pth; preview shows images; evaluate scores some and may return
    a reason to end the run (every process calls all three). save_alone: as save, for a process that has lost the
    others; None where one process does not have it all. profiler: None without --profile_steps."""

    config: TrainConfig
    state: Trained
    schedule: LrSchedule
    batches: Batches
    step: Step
    dist: DistInfo
    save: Callable[[Position], None]
    save_alone: Callable[[Position], None] | None = None
    preview: Callable[[int, MetricWriter], None] | None = None
    evaluate: Callable[[int, MetricWriter], str | None] | None = None
    profiler: StepProfiler | None = None

    @property
    def course(self) -> Course:
        return course_of(self.config, self.batches.num_images, self.batches.global_batch)


def course_of(config: TrainConfig, num_images: int, global_batch: int) -> Course:
    return Course(num_images, global_batch * config.accum_iter, config.epochs, config.max_steps)


def train(run: TrainingRun, start: Position, writer: MetricWriter, stop: StopFlag) -> int | None:
    """Trains from `start` to the end, until `stop` or until an evaluation says so, and saves then.

    Returns the signal that stopped it. Raises ValueError if an epoch has no full step, FloatingPointError where a loss
    or gradient is not finite. Whatever else is raised, what the last whole step left is saved first, if it can be.
    """
    images, images_per_step = run.course.images, run.course.images_per_step
    if images < images_per_step:
        raise ValueError(
            f"an epoch has {images} images, fewer than the {images_per_step} of a step "
            f"(accum_iter={run.config.accum_iter})"
        )
    if images % images_per_step:
        logger.info(
            "the last %d of %d images of each epoch do not fill a step of %d and are left out",
            images % images_per_step, images, images_per_step,
        )  # fmt: skip
    loop = _Loop(run, start, writer, stop)
    try:
        return loop.run_epochs()
    except Exception as error:
        loop.save_what_is_whole(error)
        raise


class _Loop:
    """Where the loop stands: position, clock, and why it is to end early."""

    def __init__(self, run: TrainingRun, start: Position, writer: MetricWriter, stop: StopFlag) -> None:
        self.run, self.position, self.writer, self.stop = run, start, writer, stop
        self.course = run.course
        self.saved_step: int | None = None
        self.first_step = start.step
        self.reason_to_end: str | None = None
        self.clock = time.perf_counter()
        self.num_images = 0
        self.is_whole = True  # weights and position belong together
        run.state.optimizer.register_step_pre_hook(self.note_update)

    def note_update(self, *_: Any) -> None:
        self.is_whole = False

    def run_epochs(self) -> int | None:
        run, signum = self.run, None
        done, left = self.position.step, self.course.steps_left(self.position)
        set_lr(run.state.optimizer, run.schedule.at(self.course.epochs_done(self.position)))  # saved even if no step is
        bar: Any = progress(total=done + left, initial=done, unit="step", rank=run.dist.rank)
        with bar:
            if run.config.eval_steps and self.position.step == 0:
                self.evaluate()  # what the start is worth
            while not self.is_finished() and signum is None:
                signum = self.run_epoch(bar)
        if signum is None and self.position.step % run.config.log_freq and self.num_images:
            self.log()  # a run that was stopped logs when it has gone on
        if self.saved_step != self.position.step:
            self.save()
        if run.profiler is not None:
            run.profiler.close()
        if signum is None:
            self.warn_of_young_average()
        return signum

    def warn_of_young_average(self) -> None:
        ema, step = self.run.state.ema, self.position.step
        share = ema.start_share(step)
        if share > YOUNG_SHARE:
            logger.warning(
                "the average is young: after %d steps at --ema_rate %g, %.1f %% of it are the weights that the stage "
                "started from, and it is what is sampled, scored and handed on: lower the rate, or --ema_warmup",
                step, ema.rate, 100 * share,
            )  # fmt: skip

    def save_what_is_whole(self, error: Exception) -> None:
        """Before the run ends by `error`: this process's last chance."""
        run, step = self.run, self.position.step
        has_news = self.is_whole and step not in (self.saved_step, self.first_step)
        if isinstance(error, FloatingPointError) or not has_news:
            return
        is_together = run.dist.world_size == 1 or isinstance(error, RanksFailed)
        save = run.save if is_together else run.save_alone
        if save is None or not (is_together or run.dist.is_main):
            return
        try:
            run.step.check()
            save(self.position)
        except (OSError, FloatingPointError, RuntimeError) as second:
            with suppress(OSError):  # the log's disk may be full as well
                logger.warning("step %d could not be saved: %s", step, one_line(second))

    def is_finished(self) -> bool:
        return self.reason_to_end is not None or self.course.is_finished(self.position)

    def run_epoch(self, bar: Any) -> int | None:
        """One epoch, or what is left of it. Returns the signal that cut it short."""
        epoch, profiler = self.position.epoch, self.run.profiler
        batches = self.run.batches.of_epoch(epoch, self.position.images)
        while self.position.epoch == epoch and not self.is_finished():
            micro_batches = self.next_batches(batches)
            set_lr(self.run.state.optimizer, self.run.schedule.at(self.course.epochs_after(self.position)))
            if profiler is not None:
                profiler.before(self.position.step)
            self.num_images += self.run.step.take(self.position, micro_batches)
            self.position = self.course.after_step(self.position)
            self.is_whole = True
            if profiler is not None:
                profiler.after(self.position.step)
            bar.update(1)
            self.after_step(is_epoch_end=self.position.epoch != epoch)
            if (signum := self.asked_to_stop()) is not None:
                return signum
        return None

    def next_batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        """A step's batches. Where one process cannot read its own, all end here, at a whole step."""
        for _ in range(self.run.config.accum_iter):
            with failing_together():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def after_step(self, is_epoch_end: bool) -> None:
        config, step, epoch = self.run.config, self.position.step, self.position.epoch
        if _is_due(step, config.log_freq):
            self.log()
        is_preview_epoch = is_epoch_end and _is_due(epoch, config.preview_epochs)
        if _is_due(step, config.eval_steps) or is_preview_epoch:
            self.evaluate()  # before saving: what it remembers is saved too
        if self.run.preview is not None and (_is_due(step, config.preview_steps) or is_preview_epoch):
            self.run.step.check()
            self.run.preview(step, self.writer)
        is_due = _is_due(step, config.save_steps) or _is_due(step, config.keep_steps)
        if is_due or (is_epoch_end and _is_due(epoch, config.save_epochs)):
            self.save()  # after all else: a run that is killed before does it again

    def evaluate(self) -> None:
        if self.run.evaluate is None:
            return
        self.run.step.check()
        self.reason_to_end = self.run.evaluate(self.position.step, self.writer)
        if self.reason_to_end is not None:
            logger.warning("ending at step %d: %s", self.position.step, self.reason_to_end)

    def asked_to_stop(self) -> int | None:
        """The signal, agreed on by all processes (torchrun passes it to each, not at the same step)."""
        if self.run.dist.world_size == 1:
            return self.stop.signum
        if self.position.step % self.run.config.signal_steps:
            return None
        signum = self.stop.signum
        return (signum or DEFAULT_SIGNUM) if any_rank(signum is not None) else None

    def log(self) -> None:
        own = self.run.step.read()
        now = time.perf_counter()
        rate = self.num_images * self.run.dist.world_size / max(now - self.clock, 1e-9)
        self.clock, self.num_images = now, 0
        means = reduce_mean(own)
        position, lr = self.position, self.run.state.optimizer.param_groups[0]["lr"]
        epoch, memory = self.course.epochs_done(position), memory_gb(self.run.dist.device)
        values = {**means, "lr": lr, "epoch": epoch, "images_per_second": rate}
        self.writer.scalars(position.step, values, board_only={"memory/gb": memory})
        shown = "  ".join(
            f"{name.replace('_', ' ')} {means[name]:.4f}" for name in self.run.step.shown if name in means
        )
        logger.info(
            "step %d  epoch %.2f  %s  lr %.2e  %.1f images/s  %.2f GB", position.step, epoch, shown, lr, rate, memory
        )

    def save(self) -> None:
        self.run.step.check()
        self.saved_step = self.position.step  # or tried to: what fails here is not tried again at once
        self.run.save(self.position)


YOUNG_SHARE = 0.1  # of an average that is the start: more is worth a warning
DEFAULT_SIGNUM = 15  # SIGTERM, for a process that hears of the signal from another one


def _is_due(count: int, interval: int) -> bool:
    return interval > 0 and count % interval == 0
