"""One rollout of stage 3: every prompt of a batch is sampled G times, decoded, detected and rewarded.

Sampling is that of evaluation (models/sampling/sampler.py), with the current weights, without gradients (`no_grad`, not
`inference_mode`: the samples enter an update), without dropout. Groups stay on the process that sampled them. The
images are rounded to 8 bits before the detector sees them, as a file would be.

Image k = b * G + g is sample g of prompt b. Shape letters: B prompts, G samples per prompt, n = B * G images, L tokens,
C token channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.data.coco import Batch
from engine.rl.rewards import LayoutReward, RewardBatch
from engine.sample.generate import ImageConditions
from engine.sample.pipeline import StructMARPipeline
from engine.train.parallel import unsharded
from models.policy.base import Samples, collect_samples
from models.sampling.config import SamplingConfig
from util.images import Picture
from util.rng import generator


@dataclass(frozen=True)
class Rollout:
    """captions: B. samples: n rows, on the training device. pictures: n. rewards: n rows, on the CPU."""

    captions: list[str]
    samples: Samples
    pictures: list[Picture]
    rewards: RewardBatch
    group_size: int

    def __len__(self) -> int:
        return len(self.samples)

    def grouped_rewards(self) -> Tensor:
        """[B, G] float32."""
        return self.rewards.total.view(-1, self.group_size)


RolloutObserver = Callable[[Sequence[Rollout], float], None]
"""(the rollouts of one update on this process, their mean reward over all processes); called before the update."""


@dataclass(frozen=True)
class RolloutWorker:
    """Samples and rewards batches of prompts with the model as it is. needs_trace: record the reverse processes."""

    pipeline: StructMARPipeline
    reward: LayoutReward
    config: SamplingConfig
    group_size: int
    needs_trace: bool
    precision: str
    seed: int

    @torch.no_grad()
    def collect(self, batch: Batch, key: Sequence[int]) -> Rollout:
        """key: what makes this batch's noise its own: step, pass, rank."""
        model, device = self.pipeline.model, self.pipeline.codec.device
        model.eval()
        text = self.pipeline.caption_encoder.context(batch.captions) if batch.text is None else batch.text
        text = text.to(device).repeated(self.group_size)
        layout = batch.layout.to(device).repeated(self.group_size)
        generators = [generator(self.seed, "rollout", *key, image) for image in range(len(layout))]
        conditions = ImageConditions(text, layout)
        with unsharded(model):
            drawn = self.pipeline.sample(conditions, self.config, generators, self.precision, record=self.needs_trace)
        samples = collect_samples(drawn, text, layout)
        pictures = self.pipeline.pictures(drawn.latents)
        prompts = [caption for caption in batch.captions for _ in range(self.group_size)]
        rewards = self.reward(to_images(pictures, device), layout, prompts)
        return Rollout(batch.captions, samples, pictures, rewards, self.group_size)


def to_images(pictures: Sequence[Picture], device: torch.device) -> Tensor:
    """Pictures of one size -> [n, 3, H, W] float32 in [0, 1]."""
    stacked = torch.from_numpy(np.stack(pictures)).to(device)  # [n, H, W, 3]
    return stacked.permute(0, 3, 1, 2).float() / 255  # [n, 3, H, W]
