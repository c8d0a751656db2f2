"""What a run costs, before it begins: images, sequential head calls, passes of the backbone, FLOPs.

Here is what all runs say alike, and what learning from a frozen teacher costs; stage 3's objectives count their own
parts (engine/rl/cost.py, engine/rl/cost_gradient.py). FLOPs are counted by `models/flops.py` on the meta device.

A step of n images that learns from a teacher, with F and B the forward and the backward pass of one image, b the
teacher's guidance branches, and E over the masks that training draws:

    student   n * E[F + B]
    teacher   n * b * E[F]

Where a second network of the head learns from r draws of the sampler in each image, with f and d the passes of one of
its rows, N evaluations of a draw, and P the backbone's part of F:

    frozen backbone   n * b * E[P]
    teacher's draws   n * r * (a token, drawn)
    few-step head     n * r * E[N] * (f + d)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from models.few_step import TRAINED_EVALS
from models.flops import ScoringFlops, draw_flops, mean_over_masks, meta_model, row_flops
from models.sampling.config import SamplingConfig
from models.sampling.guidance import choose_branches
from models.structmar import StructMARConfig
from util.units import format_count, format_flops

TEACHER_LEFT_OUT = "the frozen text encoder, the image encoder where latents are not cached, previews, evaluations"


@dataclass(frozen=True)
class RunCost:
    """Of one process. parts: FLOPs of an update by what they are spent on. updates: the length of the run; the other
    counts are of one update.

    images: sampled ones, or those that are read where nothing is sampled. iterations and head_calls: of the rollout,
    one after the other, each for all images of a batch; 0 without a rollout. With small models the number of calls, not
    their size, is what takes the time. rollout_passes, learning_passes: backbone passes of a whole batch (with all
    guidance branches), a pass with its backward as one. left_out: what is not counted, for the reader.
    """

    images: int
    parts: Mapping[str, float]
    learning_passes: int
    updates: int
    left_out: str
    iterations: int = 0
    head_calls: int = 0
    rollout_passes: int = 0

    def __post_init__(self) -> None:
        for name in ("images", "learning_passes", "updates"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {vars(self)[name]}")

    @property
    def update_flops(self) -> float:
        return sum(self.parts.values())

    @property
    def total_flops(self) -> float:
        return self.update_flops * self.updates

    def describe(self) -> list[str]:
        """What a user reads before the run, one log line each."""
        sampled = [format_count(self.iterations, "iteration"), self._calls(1) + " one after the other"]
        work = ", ".join([format_count(self.images, "image"), *(sampled if self.iterations else ["no rollout"])])
        spent = " + ".join(f"{format_flops(flops)} {name}" for name, flops in self.parts.items() if flops)
        whole = [format_count(self.updates, "update"), format_count(self.images * self.updates, "image")]
        whole += [self._calls(self.updates)] if self.iterations else []
        return [
            f"an update, per process: {work}; {spent} in {format_count(self.learning_passes, 'backbone pass', 'es')}",
            f"the run, per process: {', '.join([*whole, format_flops(self.total_flops)])}",
            f"not counted: {self.left_out}",
        ]

    def _calls(self, updates: int) -> str:
        return format_count(self.head_calls * updates, "head call")


def distillation_cost(
    config: StructMARConfig,
    teacher: SamplingConfig,
    images: int,
    num_draws: int,
    mask_schedule: str,
    mask_ratio_min: float,
    num_text_tokens: int,
    updates: int,
    accum_iter: int = 1,
) -> RunCost:
    """Of folding the teacher's guidance into one branch. images: of a batch; num_draws: noises of each hidden token.

    The teacher has all its branches in every step, also where its schedule gives them a weight of 0.
    Raises ValueError for a count below 1.
    """
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, got {num_draws}")
    flops = ScoringFlops(meta_model(config), num_text_tokens)
    mean = mean_over_masks(flops, mask_schedule, mask_ratio_min, num_draws)
    branches = len(choose_branches(teacher, has_text=True, has_layout=True)[0])
    read = images * accum_iter
    return RunCost(
        images=read,
        parts={"student": read * (mean.forward + mean.backward), "teacher": read * branches * mean.forward},
        learning_passes=2 * accum_iter,
        updates=updates,
        left_out=TEACHER_LEFT_OUT,
    )


def few_step_cost(
    config: StructMARConfig,
    teacher: SamplingConfig,
    images: int,
    num_draws: int,
    mask_schedule: str,
    mask_ratio_min: float,
    num_text_tokens: int,
    updates: int,
    accum_iter: int = 1,
) -> RunCost:
    """Of a few-step head. images: of a batch; num_draws: of all tokens of an image together.

    Raises ValueError for a count below 1.
    """
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, got {num_draws}")
    model, read = meta_model(config), images * accum_iter
    backbone = mean_over_masks(ScoringFlops(model, num_text_tokens), mask_schedule, mask_ratio_min, num_draws=0)
    row, branches = row_flops(model, is_frozen_below=True), len(choose_branches(teacher, True, True)[0])
    mean_evals = sum(TRAINED_EVALS) / len(TRAINED_EVALS)
    return RunCost(
        images=read,
        parts={
            "frozen backbone": read * branches * backbone.forward,
            "teacher's draws": read * num_draws * draw_flops(model, teacher, num_text_tokens),
            "few-step head": read * num_draws * mean_evals * (row.forward + row.backward),
        },
        learning_passes=accum_iter,
        updates=updates,
        left_out=TEACHER_LEFT_OUT,
    )
