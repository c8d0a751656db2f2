"""A training step: the public code's (its engine_mar.py, without gradient scaling, which does nothing on a CPU) and
ours (`engine.train.supervised.SupervisedStep`), on the same masks, timesteps and noise; and stage 1 against stage 2.

A step is forward, backward, clipping, AdamW and EMA. Latents are given: no VAE, no text encoder. Every step makes the
same draws, so that all have as many masked tokens. No dropout. The output that is compared is the loss and the
gradients of all one-dimensional parameters before the first step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from engine.data.inputs import StepInputs
from engine.train.loop import TrainConfig
from engine.train.optim import build_optimizer, parameter_groups
from engine.train.state import Position, TrainState
from engine.train.supervised import SupervisedStep
from models.heads.diffloss import DiffusionNoise
from models.masking import TokenMask
from models.structmar import StructMAR, TrainingNoise
from models.weights import select_trainable
from scripts.benchmark.baseline import baseline_loss, build_baseline
from scripts.benchmark.table import PUBLIC, Contender
from scripts.benchmark.world import TRAINED, TRAINED_MAR, World
from util.distributed import DistInfo
from util.ema import Ema
from util.rng import generator

SEED, LR, WEIGHT_DECAY, EMA_RATE, GRAD_CLIP, MASK_RATIO_MIN = 1, 1e-4, 0.02, 0.9999, 3.0, 0.7
MODES = {"ours": "class", "stage 2": "full", "stage 1": "text_layout"}  # who -> what trains
PUBLIC_FIRST = ((PUBLIC, "fp32"), (PUBLIC, "bf16"), ("ours", "fp32"), ("ours", "bf16"))
STAGES = (("stage 2", "fp32"), ("stage 1", "fp32"), ("stage 2", "bf16"), ("stage 1", "bf16"))


@dataclass(frozen=True)
class TrainingCase:
    """A `Case`. entries: who, and the precision."""

    name: str
    model: str
    images: int
    diffusion_batch_mul: int
    entries: tuple[tuple[str, str], ...]
    group_size: int = 1

    def contenders(self, world: World, public: ModuleType | None) -> list[Contender]:
        """Copies of the weights are trained."""
        model = world.model
        model.config = replace(model.config, diffusion_batch_mul=self.diffusion_batch_mul)
        latents = _latents(model, len(world))  # [B, C, h, w]
        noise = model.sample_training_noise(len(world), generator(SEED, "train", 0, 0, 0), MASK_RATIO_MIN)
        batch = _Batch(StepInputs(latents, world.labels, world.text, world.layout), noise)
        states: dict[str, Any] = {}  # of both precisions: the weights' values do not matter to the time
        contenders = []
        chosen = [(who, precision) for who, precision in self.entries if who != PUBLIC or public is not None]
        compared = _compared_names(model, [MODES[who] for who, _ in chosen if who in MODES])
        for who, precision in chosen:
            if who == PUBLIC:
                assert public is not None
                if who not in states:
                    states[who] = build_baseline(public, model, share=False).train()
                contenders.append(_public_step(states[who], precision, batch, compared))
            else:
                if who not in states:
                    states[who] = build_train_state(model, MODES[who])
                contenders.append(_our_step(who, states[who], precision, batch, compared))
        return contenders


TRAINING_CASES = (
    TrainingCase("MAR mar_mini step", TRAINED_MAR, 16, 4, PUBLIC_FIRST),
    TrainingCase("MAR mar_base step", "mar_base MAR", 2, 4, PUBLIC_FIRST),
    TrainingCase("StructMAR mar_mini step", TRAINED, 16, 4, STAGES),
    TrainingCase("StructMAR mar_base step", "mar_base StructMAR", 2, 4, STAGES),
    TrainingCase("StructMAR maskgil_base step", "maskgil_base StructMAR", 2, 1, STAGES),
)


def _latents(model: StructMAR, batch_size: int) -> Tensor:
    """Continuous latents or codes: [B, C, h, w]."""
    config, draws = model.config, torch.Generator().manual_seed(3)
    side = config.img_size // config.vae_stride
    shape = (batch_size, config.vae_embed_dim, side, side)
    if config.head == "discrete":
        return torch.randint(0, config.codebook_size, shape, generator=draws).float()  # [B, 1, h, w]
    return torch.randn(shape, generator=draws)  # [B, C, h, w]


@dataclass(frozen=True)
class _Batch:
    """What every contender trains on."""

    inputs: StepInputs
    noise: TrainingNoise

    @property
    def mask(self) -> TokenMask:
        return self.noise.mask

    @property
    def rows(self) -> DiffusionNoise:
        """Of the masked tokens, M copies: [M * B * m]."""
        assert isinstance(self.noise.head, DiffusionNoise)
        return self.noise.head


def build_train_state(model: StructMAR, mode: str) -> TrainState:
    """On a copy of the model, as `engine/cli/build.py` does."""
    own = copy.deepcopy(model).train()
    trainable = select_trainable(own, mode)
    return TrainState(own, own, trainable, build_optimizer(trainable, LR, WEIGHT_DECAY), Ema(trainable, EMA_RATE))


def _our_step(who: str, state: TrainState, precision: str, batch: _Batch, compared: list[str]) -> Contender:
    config = TrainConfig(SEED, 1, precision=precision, grad_clip=GRAD_CLIP, mask_ratio_min=MASK_RATIO_MIN)
    step = SupervisedStep(config, state, lambda inputs, *_: inputs, DistInfo(0, 1, 0, torch.device("cpu")))
    inputs, model = batch.inputs, state.model

    def run() -> Tensor:
        step.take(Position(), iter([inputs]))
        return torch.zeros(())

    def loss() -> Tensor:
        return model(inputs.latents, batch.noise, inputs.labels, inputs.text, inputs.layout)

    return Contender(who, precision, run, lambda: _loss_and_gradients(model, loss, precision, compared))


def _public_step(baseline: nn.Module, precision: str, batch: _Batch, compared: list[str]) -> Contender:
    parameters = list(baseline.parameters())
    groups = parameter_groups(dict(baseline.named_parameters()), WEIGHT_DECAY)  # its rule too
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95))
    averages = [parameter.detach().clone() for parameter in parameters]
    orders = torch.argsort((~batch.mask.masked).to(torch.uint8), dim=1, stable=True)  # hidden ones first
    noise, labels = _for_all_tokens(batch), batch.inputs.labels

    def loss() -> Tensor:
        assert labels is not None
        return baseline_loss(baseline, batch.inputs.latents, labels, orders, batch.mask, noise)

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            value = loss()
        value.item()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad()
        for average, parameter in zip(averages, parameters, strict=True):
            average.mul_(EMA_RATE).add_(parameter.detach(), alpha=1 - EMA_RATE)
        return torch.zeros(())

    return Contender(PUBLIC, precision, run, lambda: _loss_and_gradients(baseline, loss, precision, compared))


def _for_all_tokens(batch: _Batch) -> DiffusionNoise:
    """The public code draws for hidden and visible tokens alike: [M * B * L]; the visible ones' do not matter."""
    mask, channels = batch.mask, batch.rows.noise.shape[1]
    ids, (images, tokens) = mask.masked_ids(), mask.masked.shape  # [B, m]
    copies = len(batch.rows.timesteps) // ids.numel()
    rows = (torch.arange(images)[:, None] * tokens + ids).flatten()  # [B * m]
    every = (torch.arange(copies)[:, None] * images * tokens + rows).flatten()  # [M * B * m]
    timesteps = torch.zeros(copies * images * tokens, dtype=torch.int64)
    noise = torch.zeros(copies * images * tokens, channels)
    timesteps[every], noise[every] = batch.rows.timesteps, batch.rows.noise
    return DiffusionNoise(timesteps, noise)


def _compared_names(model: StructMAR, modes: list[str]) -> list[str]:
    """One-dimensional parameters that train in every one of the modes."""
    shapes: Mapping[str, Tensor] = dict(model.named_parameters())
    trained = [set(select_trainable(model, mode)) for mode in modes]
    return [name for name in shapes if shapes[name].dim() == 1 and all(name in names for names in trained)]


def _loss_and_gradients(model: nn.Module, loss: Callable[[], Tensor], precision: str, names: list[str]) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        value = loss()
    value.backward()
    gradients = dict(model.named_parameters())
    found = [value.detach()[None], *(gradients[name].grad.float().clone() for name in names)]  # type: ignore[union-attr]
    model.zero_grad(set_to_none=True)
    return torch.cat(found)
