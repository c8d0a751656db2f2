"""The training of a planner: a step of the loop, what is measured on the stopping set, and what is saved.

The averaged weights of the best evaluation, by the loss on the stopping set, become planner.safetensors. Every draw is
keyed by (seed, step), so a run that stops and goes on is the run that did not, bit for bit on a CPU.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.data.coco import Batch
from engine.plan.data import MakePlannerInputs
from engine.plan.files import PLANNER_NAME, PlannerIdentity, load_tensors, require_same_planner, save_planner
from engine.plan.matches import class_f1
from engine.train.loop import TrainConfig
from engine.train.meter import Meter
from engine.train.optim import clip_gradients
from engine.train.parallel import gradient_sync
from engine.train.state import Position
from models.planner import PADDING, Planner, layout_of
from util.checkpoint import load_plain, save_atomic
from util.distributed import DistInfo, failing_together, gather_objects
from util.ema import Ema
from util.logging import MetricWriter
from util.names import LAST_NAME
from util.rng import derive_seed, generator
from util.types import Layout

logger = logging.getLogger(__name__)

FORMAT = "structmar-planner-run-1"
_NEEDED: dict[str, type] = {"planner": dict, "model": dict, "model_ema": dict, "optimizer": dict, "position": dict,
                            "best": dict, "args": dict, "open_interval": list}  # fmt: skip


@dataclass(frozen=True)
class PlannerState:
    """What a step changes. wrapped: what is called, DDP around the model or itself. A `Trained` of the loop."""

    model: Planner
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema


class PlannerStep:
    """The cross-entropy of the batches' own layouts. A `Step` of the loop."""

    shown = ("loss", "grad_norm")

    def __init__(
        self, config: TrainConfig, state: PlannerState, make_inputs: MakePlannerInputs, dist: DistInfo
    ) -> None:
        self.config, self.state, self.make_inputs, self.dist = config, state, make_inputs, dist
        self.meter = Meter(dist.device, dist.rank)

    def take(self, position: Position, micro_batches: Iterator[Any]) -> int:
        config, state, step = self.config, self.state, position.step
        state.model.train()
        num_images = 0
        for micro, batch in enumerate(micro_batches):
            inputs = self.make_inputs(batch)
            torch.manual_seed(derive_seed(config.seed, "planner dropout", step, micro, self.dist.rank))
            with gradient_sync(state.wrapped, micro + 1 == config.accum_iter):
                with torch.autocast(self.dist.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    loss = state.wrapped(inputs.tokens, inputs.text)
                (loss / config.accum_iter).backward()
            self.meter.add_loss(loss.detach(), step)
            num_images += len(inputs)
        self.meter.add_norm(clip_gradients(state.model.parameters(), config.grad_clip), step)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.ema.update(step)
        return num_images

    def check(self) -> None:
        self.meter.check()

    def read(self) -> dict[str, float]:
        loss, grad_norm = self.meter.read()
        return {"loss": loss, "grad_norm": grad_norm}

    def open_interval(self) -> dict[str, Any]:
        return self.meter.state()

    def reopen(self, interval: Mapping[str, Any]) -> None:
        self.meter.restore(interval)


@dataclass
class Best:
    """The best evaluation so far. worse_since: evaluations since then."""

    loss: float = math.inf
    step: int = -1
    worse_since: int = 0


class PlannerEvaluation:
    """Loss and class F1 of the averaged weights on the stopping set; keeps the best weights as planner.safetensors.

    patience: evaluations without a better loss after which the run ends; 0: never.
    """

    def __init__(
        self,
        state: PlannerState,
        identity: PlannerIdentity,
        make_inputs: MakePlannerInputs,
        batches: Sequence[Batch],
        folder: Path,
        seed: int,
        patience: int,
        dist: DistInfo,
    ) -> None:
        self.state, self.identity, self.make_inputs, self.batches = state, identity, make_inputs, batches
        self.folder, self.seed, self.patience, self.dist = folder, seed, patience, dist
        self.best, self.last_step = Best(), -1

    def __call__(self, step: int, writer: MetricWriter) -> str | None:
        """Every process calls it. Returns why the run is to end, if it is."""
        with self.state.ema.applied():
            loss, f1 = self.measure()
            is_better = loss < self.best.loss
            if is_better:
                self.best = Best(loss, step)
                with failing_together():
                    if self.dist.is_main:
                        weights = self.state.model.state_dict()
                        save_planner(self.folder / PLANNER_NAME, self.identity, weights, step)
            else:
                self.best.worse_since += 1
        self.last_step = step
        writer.scalars(step, {"eval/loss": loss, "eval/class_F1": f1})
        logger.info("step %d  stopping set: loss %.4f%s  class F1 %.3f", step, loss, " (best)" if is_better else "", f1)
        if self.patience and self.best.worse_since >= self.patience:
            return (
                f"{self.patience} evaluations without a better loss than {self.best.loss:.4f} of step {self.best.step}"
            )
        return None

    @torch.no_grad()
    def measure(self) -> tuple[float, float]:
        """(cross-entropy per token, class F1 of one layout for each caption)."""
        model = self.state.model.eval()
        total, count = 0.0, 0
        proposed: list[Layout] = []
        real: list[Layout] = []
        for number, batch in enumerate(self.batches):
            inputs = self.make_inputs(batch)
            num_tokens = int((inputs.tokens != PADDING).sum())
            total, count = total + float(model(inputs.tokens, inputs.text)) * num_tokens, count + num_tokens
            generators = [generator(self.seed, "proposed", number, row) for row in range(len(inputs))]
            proposed += model.propose(inputs.text, generators)
            real += [layout_of(row, model.config) for row in inputs.tokens]
        return total / count, class_f1(proposed, real)


@dataclass(frozen=True)
class PlannerCheckpoint:
    """Writes and reads OUTPUT/checkpoint-last.pth. args: every flag by name, to repeat the run."""

    state: PlannerState
    identity: PlannerIdentity
    step: PlannerStep
    evaluation: PlannerEvaluation
    folder: Path
    args: dict[str, Any]
    dist: DistInfo

    @property
    def path(self) -> Path:
        return self.folder / LAST_NAME

    def save(self, position: Position) -> None:
        """Every process calls it."""
        state = self.state
        content = {
            "format": FORMAT,
            "planner": self.identity.to_dict(),
            "model": state.model.state_dict(),
            "model_ema": state.ema.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "position": asdict(position),
            "best": asdict(self.evaluation.best),
            "args": self.args,
            "open_interval": gather_objects(self.step.open_interval()),
        }
        with failing_together():
            if self.dist.is_main:
                save_atomic(content, self.path)
        logger.info("saved %s at epoch %d, step %d", self.path, position.epoch, position.step)

    def restore(self, is_wanted: bool) -> Position:
        """Where the run goes on: after what the file holds, at the start without a file or where it is not wanted.
        Raises ValueError naming the file if it is another run's."""
        if not (is_wanted and self.path.is_file()):
            return Position()
        content = load_plain(self.path)
        where = str(self.path)
        if content.get("format") != FORMAT:
            raise ValueError(f"{where} was written by another program: choose another --output_dir")
        for name, kind in _NEEDED.items():
            if not isinstance(content.get(name), kind):
                raise ValueError(f"{where}: {name} must be a {kind.__name__}, got {type(content.get(name)).__name__}")
        require_same_planner(PlannerIdentity.from_dict(content["planner"], where), self.identity, where)
        load_tensors(self.state.model, content["model"], where)
        settings = [
            {key: group[key] for key in group if key != "params"} for group in self.state.optimizer.param_groups
        ]
        self.state.optimizer.load_state_dict(content["optimizer"])
        for group, setting in zip(self.state.optimizer.param_groups, settings, strict=True):
            group.update(setting)  # this run's flags, not the file's
        self.state.ema.load_state_dict(content["model_ema"])
        self.evaluation.best = Best(**content["best"])
        if len(content["open_interval"]) == self.dist.world_size:
            self.step.reopen(content["open_interval"][self.dist.rank])
        position = Position(**content["position"])
        logger.warning("continuing from %s at epoch %d, step %d", where, position.epoch, position.step)
        return position
