"""Stage 3 by the gradient of a reward: the model predicts clean tokens, frozen networks say how far the picture is from
its layout, and backpropagation says what to change.

    L = picture_loss(decode(tokens, hidden ones as predicted))
        + anchor (mean ||eps_theta - eps_ref||^2 + 0.1 mean (v_theta - v_ref)^2)

1. States: images with hidden, noised tokens (engine/rl/gradient_states.py), of training images or own rollouts.
2. The hidden tokens in K steps of the head (models/policy/clean.py); known ones stay.
3. The frozen VAE decodes; pixels are clamped straight through. The picture's loss: engine/rl/picture_loss.py.
4. The anchor holds the predicted noise, and the variance fraction v that no reward looks at, to the start of the stage.
   Its levels are drawn over all of the diffusion, other ones than the reward's: where colours and backgrounds are
   decided, at high noise, the reward says nothing. The norm is summed over channels, meaned over tokens; v is meaned
   over both.

Exact: the gradient of L over these states, by all weights. Biased: states of training images are not the sampler's; a
prediction in few steps is blurrier than a sample; regions of the detector are cut from the graph; the unguided
prediction is what learns, so sample without guidance what was trained so.

No group, no advantages, no log-probabilities; with real states nothing is sampled. The policy is deterministic (no
dropout). Every process does the same number of backward passes.

Shape letters: B images, C latent channels, h x w latent cells, H x W pixels.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from engine.data.inputs import MakeInputs, StepInputs
from engine.rl.cost import describe_time_left
from engine.rl.gradient_states import StateSource
from engine.rl.picture_loss import PictureLoss, straight_through_clamp
from engine.rl.update import OptimizerUpdate, StepNotes
from engine.train.parallel import gradient_sync, unsharded
from engine.train.state import Position, TrainState
from models.frozen.vae import LatentCodec
from models.policy.clean import CleanPrediction, NoisyState, output_at_second
from models.structmar import StructMAR
from util.distributed import DistInfo, reduce_mean
from util.rng import generator
from util.types import LayoutBatch

logger = logging.getLogger(__name__)


VARIANCE_SHARE = 0.1  # of the variance fraction in the anchor, against 1 for the noise


@dataclass(frozen=True)
class RewardGradientConfig:
    """anchor: weight of the distance to the start. total_updates: the run's. grad_clip: 0 for none."""

    seed: int
    total_updates: int
    anchor: float = 0.3
    grad_clip: float = 1.0
    precision: str = "fp32"


@dataclass(frozen=True)
class Predictions:
    """What an update looked at last. predicted, given: [B, 3, H, W] in [0, 1], with the hidden tokens as predicted and
    as they were. timesteps: [B], the noise levels. layout: B rows. captions: B."""

    predicted: Tensor
    given: Tensor
    timesteps: list[int]
    layout: LayoutBatch
    captions: Sequence[str]


PredictionObserver = Callable[[Callable[[], Predictions], float], None]
"""(the update's last pictures, computed when asked for; minus the mean picture loss, over all processes)"""


class RewardGradientStep:
    """A `Step` of engine/train/loop.py. reference: the frozen start; None at anchor 0. make_inputs: of the images'
    latents, captions and boxes; the boxes that it leaves are those that are asked for."""

    shown = ("reward", "anchor", "loss", "grad_norm")

    def __init__(
        self,
        config: RewardGradientConfig,
        state: TrainState,
        states: StateSource,
        codec: LatentCodec,
        picture_loss: PictureLoss,
        reference: StructMAR | None,
        make_inputs: MakeInputs,
        dist: DistInfo,
        observers: Sequence[PredictionObserver] = (),
    ) -> None:
        assert (reference is None) == (config.anchor == 0), "a reference belongs to an anchor"
        self.config, self.state, self.states, self.codec, self.dist = config, state, states, codec, dist
        self.picture_loss, self.make_inputs, self.observers = picture_loss, make_inputs, observers
        self.reference = None if reference is None else reference.eval()
        self.update = OptimizerUpdate(state, config.grad_clip, dist)
        self.notes = StepNotes(self.shown)
        self.is_first = True

    # --- a Step ----------------------------------------------------------------------------------------------------

    def take(self, position: Position, micro_batches: Iterator[Any]) -> int:
        self.notes.begin()
        started, batches, rewards, num_images = time.perf_counter(), list(micro_batches), [], 0
        self.state.model.eval()
        for micro, batch in enumerate(batches):
            key = (position.step, micro, self.dist.rank)
            inputs = self.make_inputs(batch, position.epoch, generator(self.config.seed, "gradient inputs", *key))
            noisy = self.states.draw(self.state.model, inputs, key)
            num_images += len(inputs)
            is_last = micro + 1 == len(batches)
            rewards.append(self.backward(inputs, noisy, key, 1 / len(batches), is_last))
        self.notes.note(self.update(position.step))
        seconds = time.perf_counter() - started
        self.notes.note({"update_seconds": seconds})
        updates_left = self.config.total_updates - position.step - 1
        if self.is_first and updates_left > 0:
            logger.info("%s", describe_time_left(seconds, updates_left))
        self.is_first = False
        self.notes.keep()
        self._show(rewards, lambda: self.predictions(inputs, noisy, batch.captions))
        return num_images

    def check(self) -> None:
        """Steps that are not finite are left out as they happen: there is nothing to find later."""

    def read(self) -> dict[str, float]:
        return self.notes.read()

    def open_interval(self) -> dict[str, Any]:
        return self.notes.state()

    def reopen(self, interval: Mapping[str, Any]) -> None:
        self.notes.restore(interval)

    # --- the loss --------------------------------------------------------------------------------------------------

    def backward(
        self, inputs: StepInputs, noisy: NoisyState, key: Sequence[int], weight: float, is_last: bool
    ) -> Tensor:
        """Adds weight * L of one batch to the gradients. Returns minus its picture loss, a scalar."""
        with gradient_sync(self._synced(), is_last):
            found = self._predict(noisy)
            images = self.pictures(noisy.with_tokens(found.tokens), noisy.grid)  # [B, 3, H, W]
            picture, parts = self.picture_loss(images, self._layout_of(inputs), self._real(inputs), key)
            anchor, variance = self._anchor(found, noisy)
            loss = picture + self.config.anchor * (anchor + VARIANCE_SHARE * variance)
            (weight * loss).backward()
        self.notes.note({**parts, "reward": -picture, "anchor": anchor, "variance": variance, "loss": loss})
        return -picture.detach()

    def pictures(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """tokens: [B, L, C] -> [B, 3, H, W] in [0, 1], with gradients."""
        pixels = self.codec.decode_with_gradient(self.state.model.unpatchify(tokens, grid))  # [B, 3, H, W]
        return (straight_through_clamp(pixels) + 1) / 2  # [B, 3, H, W]

    @torch.no_grad()
    def predictions(self, inputs: StepInputs, noisy: NoisyState, captions: Sequence[str]) -> Predictions:
        """Of the weights as they are by now. A sharded model's processes must all ask."""
        with unsharded(self.state.model):  # and sharded again: no backward pass follows that would do it
            found = self._predict(noisy)
        predicted = self.pictures(noisy.with_tokens(found.tokens), noisy.grid)  # [B, 3, H, W]
        given = self.pictures(noisy.tokens, noisy.grid)  # [B, 3, H, W]
        return Predictions(predicted, given, noisy.timesteps.tolist(), self._layout_of(inputs), captions)

    # --- parts -----------------------------------------------------------------------------------------------------

    def _predict(self, noisy: NoisyState) -> CleanPrediction:
        with self._autocast():
            found: CleanPrediction = self.state.wrapped(noisy)
        return found

    def _anchor(self, found: CleanPrediction, noisy: NoisyState) -> tuple[Tensor | float, Tensor | float]:
        """The distances of noise and variance."""
        if self.reference is None or found.second is None:
            return 0.0, 0.0
        with torch.no_grad(), self._autocast():
            start = output_at_second(self.reference, noisy)  # [B, m, 2C]
        eps_gap, variance_gap = (found.second - start).chunk(2, dim=-1)  # each [B, m, C]
        return eps_gap.square().sum(-1).mean(), variance_gap.square().mean()

    @torch.no_grad()
    def _real(self, inputs: StepInputs) -> Tensor | None:
        """The training images as the VAE gives them back: [B, 3, H, W] in [0, 1]; None where nobody compares."""
        if not self.picture_loss.needs_real:
            return None
        return (self.codec.decode(inputs.latents) + 1) / 2  # [B, 3, H, W]

    def _layout_of(self, inputs: StepInputs) -> LayoutBatch:
        assert inputs.layout is not None, "stage 3 has layouts"
        return inputs.layout

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.dist.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _synced(self) -> nn.Module:
        """Whose gradients are exchanged: the sharded model's, or those of DDP around the policy."""
        return self.state.model if isinstance(self.state.model, FSDPModule) else self.state.wrapped

    def _show(self, rewards: Sequence[Tensor], predictions: Callable[[], Predictions]) -> None:
        """To the observers, once the step is whole: a step that fails is taken again."""
        mean_reward = reduce_mean({"reward": float(torch.stack(list(rewards)).mean())})["reward"]
        for observer in self.observers:
            observer(predictions, mean_reward)
