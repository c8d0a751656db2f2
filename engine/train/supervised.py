"""The step of every stage that learns from given images: stages 1 and 2, pretraining by class, the distillations.

`accum_iter` passes over a batch each, one clip, one AdamW update, one EMA update. Everything random in a pass comes
from a generator keyed by (seed, step, pass, rank). Dropout has no generator of its own: PyTorch's global one is
re-seeded by the same key before each pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engine.data.inputs import MakeInputs, StepInputs
from engine.train.loop import TrainConfig
from engine.train.meter import Meter
from engine.train.optim import clip_gradients
from engine.train.parallel import gradient_sync
from engine.train.state import Position, TrainState
from models.structmar import TrainingNoise
from util.distributed import DistInfo
from util.rng import derive_seed, generator


class Noise(Protocol):
    """Everything random about a pass."""

    def to(self, device: torch.device | str) -> Noise: ...


DrawNoise = Callable[[StepInputs, torch.Generator], Noise]


class SupervisedStep:
    """A loss on the batches' own images, that of `state.wrapped`: stages 1 and 2, and distillation. A `Step`.

    has_dropout: False where what is learned is another model's word, which dropout would only blur. draw_noise: the
    randomness of a pass, which `state.wrapped` is handed; None: of stages 1 and 2."""

    shown = ("loss", "grad_norm")

    def __init__(
        self,
        config: TrainConfig,
        state: TrainState,
        make_inputs: MakeInputs,
        dist: DistInfo,
        has_dropout: bool = True,
        draw_noise: DrawNoise | None = None,
    ) -> None:
        self.config, self.state, self.make_inputs, self.dist = config, state, make_inputs, dist
        self.has_dropout, self.draw_noise = has_dropout, draw_noise or self.training_noise
        self.meter = Meter(dist.device, dist.rank)

    def take(self, position: Position, micro_batches: Iterator[Any]) -> int:
        config, state, meter, rank = self.config, self.state, self.meter, self.dist.rank
        state.model.train(self.has_dropout)
        num_images, losses = 0, []
        for micro, batch in enumerate(micro_batches):
            rng = generator(config.seed, "train", position.step, micro, rank)
            inputs = self.make_inputs(batch, position.epoch, rng)
            noise = self.draw_noise(inputs, rng)
            torch.manual_seed(derive_seed(config.seed, "dropout", position.step, micro, rank))
            is_last = micro + 1 == config.accum_iter
            loss = backward_pass(state.wrapped, inputs, noise, config.precision, config.accum_iter, is_last)
            meter.watch("latents", inputs.latents, position.step)
            if inputs.text is not None:
                meter.watch("text", inputs.text.pooled, position.step)
            losses.append(loss)
            num_images += len(inputs)
        assert micro + 1 == config.accum_iter, "an epoch's batches ended in the middle of a step"
        for loss in losses:
            meter.add_loss(loss, position.step)
        meter.add_norm(clip_gradients(state.trainable.values(), config.grad_clip), position.step)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.ema.update(position.step)
        return num_images

    def training_noise(self, inputs: StepInputs, rng: torch.Generator) -> TrainingNoise:
        config, model = self.config, self.state.model
        grid = model.grid_of(inputs.latents)
        return model.sample_training_noise(len(inputs), rng, config.mask_ratio_min, grid, config.mask_schedule)

    def check(self) -> None:
        self.meter.check()

    def read(self) -> dict[str, float]:
        loss, grad_norm = self.meter.read()
        return {"loss": loss, "grad_norm": grad_norm}

    def open_interval(self) -> dict[str, Any]:
        return self.meter.state()

    def reopen(self, interval: Mapping[str, Any]) -> None:
        self.meter.restore(interval)


def backward_pass(
    wrapped: nn.Module,
    inputs: StepInputs,
    noise: Noise,
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
                noise.to(device),
                labels=inputs.labels,
                text=inputs.text,
                layout=inputs.layout,
                sizes=inputs.sizes,
            )
        (loss / accum_iter).backward()
    return loss.detach()
