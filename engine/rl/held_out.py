"""What stage 3 shows and checks between updates: pictures of rollouts, scores by a detector that does not reward."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.data.scenes import Scene
from engine.eval.online import OnlineEvaluation
from engine.rl.guard import OverOptimisationGuard
from engine.rl.rollout import Rollout
from engine.rl.rollout_grid import rollout_grid
from util.distributed import DistInfo
from util.images import save_png
from util.logging import MetricWriter
from util.types import Category, Layout, LayoutBatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOutEvaluation:
    """Called by the loop on every process. The guard is told the held-out AP50 and the mean reward of the updates since
    the last evaluation, which `note` (a `RolloutObserver`) collects. rewards: one per update."""

    online: OnlineEvaluation
    guard: OverOptimisationGuard
    rewards: list[float] = field(default_factory=list)

    def note(self, _rollouts: Sequence[Rollout], mean_reward: float) -> None:
        self.rewards.append(mean_reward)

    def __call__(self, step: int, writer: MetricWriter) -> str | None:
        """The reason to end the run, if the guard has one and may stop it."""
        scores = self.online.score(step, writer)
        mean_reward = sum(self.rewards) / len(self.rewards) if self.rewards else None
        message = self.guard.update(step, mean_reward, scores["AP50"])
        self.rewards.clear()
        if message is None:
            return None
        logger.warning("%s", message)
        return message if self.guard.stops else None

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"guard": self.guard.state(), "rewards": list(self.rewards)}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Goes on from `state()`; None: a run that just starts."""
        if state is not None:
            self.guard.restore(state["guard"])
            self.rewards[:] = state["rewards"]


@dataclass
class RolloutPreview:
    """Called by the loop on every process; rank 0 writes rollouts/step-N.png and shows it in TensorBoard.

    num_prompts: of the last rollout, each with all its images. min_score: detections below it are not drawn.
    last: the last rollout, which `note` (a `RolloutObserver`) keeps; None before the first.
    """

    categories: Sequence[Category]
    num_prompts: int
    min_score: float
    dist: DistInfo
    output_dir: Path
    last: Rollout | None = None

    def note(self, rollouts: Sequence[Rollout], _mean_reward: float) -> None:
        self.last = rollouts[-1]

    def __call__(self, step: int, writer: MetricWriter) -> None:
        rollout = self.last
        if rollout is None or not self.dist.is_main:
            return
        count = min(len(rollout), self.num_prompts * rollout.group_size)
        grid = rollout_grid(
            rollout.pictures[:count],
            rollout_scenes(rollout, self.categories)[:count],
            rollout.rewards.detections[:count],
            rollout.rewards.total[:count].tolist(),
            self.categories,
            self.min_score,
            group_size=rollout.group_size,
        )
        path = self.output_dir / "rollouts" / f"step-{step:07d}.png"
        save_png(grid, path)
        writer.image(step, "rollouts", grid)


def rollout_scenes(rollout: Rollout, categories: Sequence[Category]) -> list[Scene]:
    """What each of the n images was asked to be."""
    layout = rollout.samples.layout
    assert layout is not None, "stage 3 has layouts"
    captions = [rollout.captions[row // rollout.group_size] for row in range(len(rollout))]
    return layout_scenes(captions, layout, categories)


def layout_scenes(captions: Sequence[str], layout: LayoutBatch, categories: Sequence[Category]) -> list[Scene]:
    """What each image was asked to be. captions: one for each row of the layout."""
    layout, scenes = layout.to("cpu"), []
    for row, caption in enumerate(captions):
        valid = layout.valid[row]
        boxes = Layout(layout.boxes_xyxy[row][valid], layout.categories[row][valid])
        names = [categories[index].name for index in boxes.categories.tolist()]
        scenes.append(Scene(caption, boxes, names))
    return scenes
