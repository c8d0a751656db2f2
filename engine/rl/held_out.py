"""What stage 3 shows and checks between updates: pictures of rollouts, scores by a detector that does not reward."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.scenes import Scene
from engine.eval.online import OnlineEvaluation
from engine.rl.guard import OverOptimisationGuard
from engine.rl.rollout import Rollout
from engine.rl.rollout_grid import rollout_grid
from engine.rl.step import GrpoStep
from util.distributed import DistInfo
from util.images import save_png
from util.logging import MetricWriter
from util.types import Category, Layout

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOutEvaluation:
    """Called by the loop on every process; the guard hears the held-out AP50 and the rewards since the last round."""

    online: OnlineEvaluation
    guard: OverOptimisationGuard
    step: GrpoStep

    def __call__(self, step: int, writer: MetricWriter) -> str | None:
        """The reason to end the run, if the guard has one and may stop it."""
        scores = self.online.score(step, writer)
        rewards = self.step.rewards_since_evaluation
        message = self.guard.update(step, sum(rewards) / len(rewards) if rewards else None, scores["AP50"])
        rewards.clear()
        if message is None:
            return None
        logger.warning("%s", message)
        return message if self.guard.stops else None

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"guard": self.guard.state(), "rewards": list(self.step.rewards_since_evaluation)}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Goes on from `state()`; None: a run that just starts."""
        if state is not None:
            self.guard.restore(state["guard"])
            self.step.rewards_since_evaluation[:] = state["rewards"]


@dataclass(frozen=True)
class RolloutPreview:
    """Called by the loop on every process; rank 0 writes rollouts/step-N.png and shows it in TensorBoard.

    num_prompts: of the last rollout, each with all its images. min_score: detections below it are not drawn.
    """

    step: GrpoStep
    categories: Sequence[Category]
    num_prompts: int
    min_score: float
    dist: DistInfo
    output_dir: Path

    def __call__(self, step: int, writer: MetricWriter) -> None:
        rollout = self.step.last_rollout
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
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(grid, path)
        writer.image(step, "rollouts", grid)


def rollout_scenes(rollout: Rollout, categories: Sequence[Category]) -> list[Scene]:
    """What each of the n images was asked to be."""
    layout = rollout.samples.layout
    assert layout is not None, "stage 3 has layouts"
    layout, scenes = layout.to("cpu"), []
    for row in range(len(rollout)):
        valid = layout.valid[row]
        boxes = Layout(layout.boxes_xyxy[row][valid], layout.categories[row][valid])
        names = [categories[index].name for index in boxes.categories.tolist()]
        scenes.append(Scene(rollout.captions[row // rollout.group_size], boxes, names))
    return scenes
