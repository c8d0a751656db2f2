"""The reward gradient of a tiny model, VAE and detector, all with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from engine.data.inputs import StepInputs
from engine.rl.augment import Augmentation
from engine.rl.gradient_states import NoiseLevels, RealStates
from engine.rl.picture_loss import PictureLoss
from engine.rl.reward_gradient import PredictionObserver, RewardGradientConfig, RewardGradientStep
from engine.train.optim import build_optimizer
from engine.train.parallel import wrap
from engine.train.state import Position, TrainState
from models.config import SMALL
from models.frozen.detector_loss import DetectorLoss
from models.frozen.faster_rcnn import Detector, build_detector
from models.frozen.vae import LatentCodec, build_autoencoder
from models.policy.clean import CleanPolicy
from models.structmar import StructMAR
from tests.helpers.rl_world import frozen_copy, variant
from tests.helpers.tiny import CATEGORIES
from tests.helpers.tiny_run import LATENT_SCALE, VAE
from tests.helpers.training import CPU, tiny_inputs
from util.distributed import DistInfo
from util.ema import Ema
from util.types import LayoutBatch

SEED = 5
LEVELS = NoiseLevels(200, 850)


def tiny_codec() -> LatentCodec:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return LatentCodec(build_autoencoder(VAE), VAE, LATENT_SCALE, "0" * 64)


def tiny_detector(seed: int = 0) -> Detector:
    """Of `CATEGORIES`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_detector(SMALL, len(CATEGORIES) + 1)
        for weight in model.parameters():
            if weight.dim() > 1:  # as they are built, what reaches the pixels is rounding
                torch.nn.init.kaiming_normal_(weight)
    return Detector(model, SMALL, dict(enumerate(CATEGORIES, start=1)), f"{seed}" * 64)


def picture_loss(w_colour: float = 0.0, detectors: int = 1, w_pixels: float = 0.0, **changes: float) -> PictureLoss:
    """changes: of the augmentation."""
    losses = [(DetectorLoss(tiny_detector(seed), CATEGORIES), 1.0) for seed in range(detectors)]
    return PictureLoss(losses, w_colour, w_pixels, Augmentation(**changes), SEED)


class Darkness:
    """Stands in for a `PictureLoss`: how bright pictures are. Smooth, and fast."""

    needs_real = False

    def __call__(
        self, images: Tensor, layout: LayoutBatch, real: Tensor | None, key: Sequence[int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return images.square().mean(), {}


def darkness() -> PictureLoss:
    return cast(PictureLoss, Darkness())


def gradient_state_of(
    model: StructMAR, num_steps: int = 1, has_anchor: bool = True, dist: DistInfo = CPU, lr: float = 1e-3
) -> TrainState:
    """As engine/cli/build.py's; --ema_rate .9. dist: with more than one process, DDP if they have joined a group."""
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    called = CleanPolicy(model, num_steps, clip_x0=5.0, has_second=has_anchor)
    world_size = dist.world_size if torch.distributed.is_initialized() else 1
    wrapped = called if isinstance(model, FSDPModule) else wrap(called, dist.device, world_size)
    return TrainState(model, wrapped, trainable, build_optimizer(trainable, lr, 0.0), Ema(trainable, 0.9))


def gradient_step(
    model: StructMAR | None = None,
    loss: PictureLoss | None = None,
    dist: DistInfo = CPU,
    lr: float = 1e-3,
    num_steps: int = 1,
    observers: Sequence[PredictionObserver] = (),
    reference: StructMAR | None = None,
    **settings: Any,
) -> RewardGradientStep:
    """A step on `model` (None: a new one). reference: None for a copy of the model; no part of it at anchor 0."""
    model = variant() if model is None else model
    config = RewardGradientConfig(**{"seed": SEED, "total_updates": 4, "grad_clip": 0.0} | settings)
    return RewardGradientStep(
        config,
        gradient_state_of(model, num_steps, config.anchor > 0, dist, lr),
        RealStates(LEVELS, SEED),
        tiny_codec(),
        picture_loss() if loss is None else loss,
        None if config.anchor == 0 else reference or frozen_copy(model),
        lambda batch, epoch, draws: batch,
        dist,
        observers,
    )


def take_update(step: RewardGradientStep, number: int = 0, batches: Sequence[StepInputs] = ()) -> dict[str, float]:
    """One update; returns what it logged."""
    step.take(Position(0, number, number), iter(batches or [tiny_inputs(2)]))
    return step.read()
