"""Pictures of a reward gradient: what an update was given, and what was predicted from it, with wanted and found boxes.

A row is one image, under its caption: on the left as its tokens were, on the right with the hidden ones as predicted at
the update's noise level. Below each stands the reward of rollouts (engine/rl/rewards.py), by the first detector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.rl.held_out import layout_scenes
from engine.rl.reward_gradient import Predictions
from engine.rl.rewards import LayoutReward
from engine.rl.rollout_grid import rollout_grid
from util.distributed import DistInfo
from util.images import save_png, to_picture
from util.logging import MetricWriter
from util.types import Category


@dataclass
class PredictionPreview:
    """Called by the loop on every process; rank 0 writes predictions/step-N.png and shows it in TensorBoard.

    num_prompts: images of the last update. min_score: detections below it are not drawn. last: how to make the last
    update's pictures, which `note` (a `PredictionObserver`) keeps; None before the first.
    """

    reward: LayoutReward
    categories: Sequence[Category]
    num_prompts: int
    min_score: float
    dist: DistInfo
    output_dir: Path
    last: Callable[[], Predictions] | None = None

    def note(self, predictions: Callable[[], Predictions], _mean_reward: float) -> None:
        self.last = predictions

    def __call__(self, step: int, writer: MetricWriter) -> None:
        if self.last is None:
            return
        predictions = self.last()  # on every process: a sharded model needs all
        if not self.dist.is_main:
            return
        count = min(len(predictions.captions), self.num_prompts)
        pairs = torch.stack([predictions.given, predictions.predicted], dim=1)[:count]  # [n, 2, 3, H, W]
        images = pairs.flatten(0, 1).clamp(0, 1)  # [2 n, 3, H, W]; rounding may leave the range
        layout = predictions.layout.map(lambda tensor: tensor[:count]).repeated(2)
        captions = [caption for caption in predictions.captions[:count] for _ in range(2)]
        rewards = self.reward(images, layout, captions)
        titles = [f"{caption} (t = {predictions.timesteps[row // 2]})" for row, caption in enumerate(captions)]
        grid = rollout_grid(
            [to_picture(2 * image - 1) for image in images],
            layout_scenes(titles, layout, self.categories),
            rewards.detections,
            rewards.total.tolist(),
            self.categories,
            self.min_score,
            group_size=2,
        )
        save_png(grid, self.output_dir / "predictions" / f"step-{step:07d}.png")
        writer.image(step, "predictions", grid)
