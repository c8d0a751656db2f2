"""Stage 3 without data, VAE and detector: a tiny model, rewards of tokens, everything else as in a real run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from engine.data.inputs import StepInputs
from engine.rl.credit import RegionRewards
from engine.rl.rewards import RewardBatch
from engine.rl.rollout import Rollout, RolloutWorker
from engine.rl.step import GrpoConfig, GrpoStep
from engine.train.optim import build_optimizer
from engine.train.parallel import wrap
from engine.train.state import Position, TrainState
from models.frozen.detections import Detections
from models.layout import cells_inside
from models.policy.base import Estimator, Policy, Samples, collect_samples
from models.policy.elbo import ElboEstimator
from models.policy.exact import ExactEstimator
from models.policy.trajectory import TrajectoryEstimator
from models.sampling.config import SamplingConfig, default_sampling
from models.sampling.sampler import sample
from models.structmar import StructMAR
from models.weights import select_trainable
from tests.helpers.training import CPU, tiny_inputs, tiny_model
from util.distributed import DistInfo
from util.ema import Ema
from util.rng import generator

SAMPLING = SamplingConfig(num_iter=3, num_sampling_steps=6, t_max=950, clip_x0=3.0)
CODES = default_sampling("discrete", num_iter=3, order="random", temperature=0.8)
ESTIMATORS: dict[str, Estimator] = {
    "elbo": ElboEstimator(num_iter=3, num_masks=2, num_draws=2),
    "trajectory": TrajectoryEstimator(SAMPLING, num_masks=2),
    "exact": ExactEstimator(CODES, num_masks=2),
}
CODEBOOK_SIZE = 6
DISCRETE = {"head": "discrete", "codebook_size": CODEBOOK_SIZE, "vae_embed_dim": 1}
SETTINGS = GrpoConfig(seed=5, total_updates=4, inner_epochs=1, grad_clip=0.0)

TokenReward = Callable[[Tensor], Tensor]
"""tokens [n, L, C] -> rewards [n]."""


def brightness(tokens: Tensor) -> Tensor:
    return tokens[..., 0].mean(1)  # [n]


def rewarded(total: Tensor, samples: Samples) -> RewardBatch:
    """total: [n]. A box earns the brightness of its tokens."""
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    regions = [RegionRewards(own, torch.zeros(0, 4), torch.zeros(0)) for own in brightness_of_boxes(samples)]
    return RewardBatch(total, {"iou": total}, [nothing] * len(total), regions)


def brightness_of_boxes(samples: Samples) -> list[Tensor]:
    """[k] for each image."""
    if samples.layout is None:
        return [torch.zeros(0)] * len(samples)
    inside = cells_inside(samples.layout.boxes_xyxy, samples.grid).float()  # [n, L, N]
    means = torch.einsum("nl,nlk->nk", samples.tokens[..., 0], inside) / inside.sum(1)  # [n, N]
    return [row[valid] for row, valid in zip(means, samples.layout.valid, strict=True)]


@dataclass
class TokenWorker:
    """Samples as the RolloutWorker does, and rewards the tokens. keys: what it was called with."""

    model: StructMAR
    reward: TokenReward = brightness
    config: SamplingConfig = SAMPLING
    group_size: int = 3
    needs_trace: bool = True
    keys: list[tuple[int, ...]] = field(default_factory=list)

    def collect(self, batch: StepInputs, key: Sequence[int]) -> Rollout:
        self.model.eval()
        self.keys.append(tuple(key))
        count = len(batch) * self.group_size
        text = None if batch.text is None else batch.text.repeated(self.group_size)
        layout = None if batch.layout is None else batch.layout.repeated(self.group_size)
        draws = [generator(SETTINGS.seed, "rollout", *key, image) for image in range(count)]
        output = sample(self.model, self.config, draws, text, layout, record=self.needs_trace)
        samples = collect_samples(output, text, layout)
        picture = np.zeros((32, 32, 3), dtype=np.uint8)
        total = self.reward(samples.tokens)  # [n]
        return Rollout(
            [f"{row}" for row in range(len(batch))],
            samples,
            [picture] * count,
            rewarded(total, samples),
            self.group_size,
        )


@dataclass
class Seen:
    """A `RolloutObserver` that keeps everything."""

    rollouts: list[Rollout] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)

    def __call__(self, rollouts: Sequence[Rollout], mean_reward: float) -> None:
        self.rollouts += rollouts
        self.rewards.append(mean_reward)


def variant(mode: str = "full", **overrides: Any) -> StructMAR:
    """tests/engine/train/test_loop.py's model, the same weights in another configuration."""
    model = StructMAR(replace(tiny_model().config, **overrides))
    model.load_state_dict(tiny_model().state_dict())
    select_trainable(model, mode)
    return model.eval()


def code_variant(mode: str = "full", **overrides: Any) -> StructMAR:
    """The same with a discrete head, whose weights are its own."""
    torch.manual_seed(4)
    model = StructMAR(replace(tiny_model().config, **DISCRETE, **overrides))
    own = tiny_model().state_dict()
    shared = {name: own[name] for name, tensor in model.state_dict().items() if name in own}
    model.load_state_dict({**model.state_dict(), **shared})
    torch.nn.init.normal_(model.code_head.out.weight, std=0.2)
    select_trainable(model, mode)
    return model.eval()


def model_for(estimator: str, mode: str = "full", **overrides: Any) -> StructMAR:
    """With the head whose tokens the estimator scores."""
    return (code_variant if ESTIMATORS[estimator].head == "discrete" else variant)(mode, **overrides)


def as_codes(batch: StepInputs) -> StepInputs:
    """The same images as codes [B, 1, h, w]."""
    codes = (batch.latents[:, :1].sigmoid() * CODEBOOK_SIZE).floor()  # [B, 1, h, w]
    return replace(batch, latents=codes)


def train_state_of(model: StructMAR, estimator: Estimator, dist: DistInfo = CPU, lr: float = 1e-3) -> TrainState:
    """As engine/cli/build.py's; --ema_rate .9. dist: with more than one process, DDP if they have joined a group."""
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    world_size = dist.world_size if torch.distributed.is_initialized() else 1
    called = Policy(model, estimator)
    wrapped = called if isinstance(model, FSDPModule) else wrap(called, dist.device, world_size)
    return TrainState(model, wrapped, trainable, build_optimizer(trainable, lr, 0.0), Ema(trainable, 0.9))


def frozen_copy(model: StructMAR) -> StructMAR:
    return copy.deepcopy(model).requires_grad_(False).eval()


def grpo_step(
    model: StructMAR | None = None,
    estimator: str | Estimator = "elbo",
    reward: TokenReward = brightness,
    dist: DistInfo = CPU,
    lr: float = 1e-3,
    seen: Seen | None = None,
    **settings: Any,
) -> GrpoStep:
    """A step on `model` (None: a new one) with a reference of equal weights, unless kl_coef is 0. seen: observes it."""
    chosen = ESTIMATORS[estimator] if isinstance(estimator, str) else estimator
    has_codes = chosen.head == "discrete"
    model = (code_variant() if has_codes else variant()) if model is None else model
    config, sampling = replace(SETTINGS, **settings), CODES if has_codes else SAMPLING
    worker = cast(RolloutWorker, TokenWorker(model, reward, sampling, needs_trace=chosen.needs_trace))
    reference = None if config.kl_coef == 0 else frozen_copy(model)
    read = as_codes if has_codes else lambda batch: batch
    make_inputs = None if config.rl_step_ratio == 1 else lambda batch, epoch, draws: read(batch)
    state, observers = train_state_of(model, chosen, dist, lr), [] if seen is None else [seen]
    return GrpoStep(config, state, worker, chosen, reference, make_inputs, dist, observers)


def worker_of(step: GrpoStep) -> TokenWorker:
    return cast(TokenWorker, step.worker)


def batches(count: int = 1, seed: int = 0) -> Iterator[StepInputs]:
    """Batches of two prompts (and the images that an SFT part trains on)."""
    return iter([tiny_inputs(2, seed + number) for number in range(count)])


def take(step: GrpoStep, number: int = 0, count: int = 1, seed: int = 0) -> dict[str, float]:
    """One update; returns what it logged."""
    step.take(Position(0, number, number), batches(count, seed))
    return step.read()


@contextmanager
def recorded_gradients(step: GrpoStep) -> Iterator[list[dict[str, Tensor]]]:
    """The gradients, by name, that each optimizer step in the block sees."""
    seen: list[dict[str, Tensor]] = []

    def note(*_: Any) -> None:
        given = {name: parameter.grad for name, parameter in step.state.trainable.items()}
        seen.append({name: gradient.detach().clone() for name, gradient in given.items() if gradient is not None})

    handle = step.state.optimizer.register_step_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def gradient_of_update(step: GrpoStep, count: int = 1) -> dict[str, Tensor]:
    """Of one update with one inner epoch."""
    with recorded_gradients(step) as seen:
        take(step, count=count)
    assert len(seen) == 1
    return seen[0]


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def poison(step: GrpoStep, name: str = "decoder_embed.weight") -> torch.utils.hooks.RemovableHandle:
    """From now on one gradient is NaN."""
    return step.state.trainable[name].register_hook(lambda gradient: gradient * torch.nan)
