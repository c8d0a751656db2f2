"""How images are drawn, as plain values, and what these make of each iteration: reverse steps, scales, branches.

The options that spend less than MAR does, all off by default; each draws other images than the plain sampler:

- `num_sampling_steps_last`: fewer reverse steps the more is known of the image (DiSA, arXiv:2505.20297).
- `guidance_interval`: guidance in some iterations only (as arXiv:2404.07724 does over noise levels).
- `uncond_refresh`: guidance's other branches run in some iterations; in between, what the backbone's outputs differ by
  is taken from the last run (the condition cache of LazyMAR, arXiv:2503.12450).
- `order`: see `orders.py`.

Command lines name what stands here, so this file imports PyTorch only where it computes with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from models.config import NUM_TRAIN_STEPS, require_reverse_steps

if TYPE_CHECKING:
    from models.heads.diffusion_sampler import ReverseOptions

ORDERS = ("random", "gtr", "halton")
CFG_SCHEDULES = ("linear", "constant")
ANNEALED_T_MAX = 950  # few steps from t = 999 multiply errors of eps by thousands (models/heads/diffusion.py)
MAX_GUIDANCE, MAX_TEMPERATURE, MAX_CLIP_X0 = 100.0, 10.0, 1e6  # beyond, pictures are noise
FIRST_RUNS = 5  # iterations in a row that run every branch before differences are reused

BranchUse = Literal["full only", "run", "reuse"]


@dataclass(frozen=True)
class SamplingConfig:
    """num_iter: backbone passes. num_sampling_steps: reverse steps per token. cfg_text scales the caption (or the class
    label), cfg_layout the boxes; 1 is no guidance. cfg_schedule: `linear` grows guidance with the share of unmasked
    tokens. clip_x0: bound of predicted tokens. t_max: timesteps above it are clipped; None: none are, but
    `ANNEALED_T_MAX` where steps are annealed.

    num_sampling_steps_last: reverse steps in the last iteration, linear from num_sampling_steps in the first; None: the
    same in all. guidance_interval: the share of iterations, from and up to, in which there is guidance.
    uncond_refresh: the other branches run in every so many-th of these, after `FIRST_RUNS`; 1: in all.
    """

    num_iter: int = 64
    num_sampling_steps: int = 100
    cfg_text: float = 1.0
    cfg_layout: float = 1.0
    cfg_schedule: str = "linear"
    temperature: float = 1.0
    clip_x0: float | None = None
    t_max: int | None = None
    num_sampling_steps_last: int | None = None
    order: str = "random"
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    uncond_refresh: int = 1

    def __post_init__(self) -> None:
        if self.num_iter < 1:
            raise ValueError(f"num_iter must be at least 1, got {self.num_iter}")
        if self.cfg_schedule not in CFG_SCHEDULES:
            raise ValueError(f"cfg_schedule must be one of {CFG_SCHEDULES}, got {self.cfg_schedule!r}")
        for name, high in (("cfg_text", MAX_GUIDANCE), ("cfg_layout", MAX_GUIDANCE), ("temperature", MAX_TEMPERATURE)):
            if not 0 <= getattr(self, name) <= high:  # NaN is refused too
                raise ValueError(f"{name} must lie in [0, {high:g}], got {getattr(self, name)}")
        if self.clip_x0 is not None and not 0 < self.clip_x0 <= MAX_CLIP_X0:
            raise ValueError(f"clip_x0 must lie in (0, {MAX_CLIP_X0:g}], got {self.clip_x0}")
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {ORDERS}, got {self.order!r}")
        low, high = self.guidance_interval
        if not 0 <= low < high <= 1:
            raise ValueError(f"guidance_interval must be two rising numbers in [0, 1], got {low} and {high}")
        if self.uncond_refresh < 1:
            raise ValueError(f"uncond_refresh must be at least 1, got {self.uncond_refresh}")
        require_reverse_steps(self.num_sampling_steps, self.t_max)
        last = self.num_sampling_steps_last
        if last is not None and not 1 <= last <= NUM_TRAIN_STEPS:
            raise ValueError(f"num_sampling_steps_last must lie between 1 and {NUM_TRAIN_STEPS}, got {last}")

    @property
    def is_annealed(self) -> bool:
        return self.num_sampling_steps_last is not None

    @property
    def num_reverse_steps(self) -> int:
        """Those that are left once steps above t_max are merged (in one iteration: see `at`)."""
        return len(self.reverse_options.steps)

    @property
    def reverse_options(self) -> ReverseOptions:
        """The diffusion head's, where the steps are the same in all iterations (see `at`)."""
        from models.heads.diffusion_sampler import ReverseOptions

        return ReverseOptions(self.num_sampling_steps, self.t_max, self.temperature, self.clip_x0)

    def at(self, iteration: int) -> SamplingConfig:
        """The options of one iteration: the same number of reverse steps in all."""
        first, last = self.num_sampling_steps, self.num_sampling_steps_last
        if last is None:
            return self
        share = iteration / max(1, self.num_iter - 1)
        t_max = ANNEALED_T_MAX if self.t_max is None else self.t_max
        steps = round(first + (last - first) * share)
        return replace(self, num_sampling_steps=steps, num_sampling_steps_last=None, t_max=t_max)

    def branch_uses(self, num_branches: int) -> list[BranchUse]:
        """What becomes of guidance's branches in each iteration: only the full one counts, all run, or the other ones'
        difference to the full one is reused."""
        if num_branches == 1:
            return ["run"] * self.num_iter
        low, high = (share * self.num_iter for share in self.guidance_interval)
        uses: list[BranchUse] = []
        num_guided = 0
        for iteration in range(self.num_iter):
            if not low <= iteration < high:
                uses.append("full only")
                continue
            runs = num_guided < FIRST_RUNS or (num_guided - FIRST_RUNS + 1) % self.uncond_refresh == 0
            uses.append("run" if runs else "reuse")
            num_guided += 1
        return uses

    def require_traceable(self) -> None:
        """Raises ValueError if the reverse processes cannot be scored by their log-probabilities."""
        if self.temperature == 0:
            raise ValueError("recording needs draws, which have no density at temperature 0")
        if self.is_annealed:
            raise ValueError(
                "recorded reverse processes (the trajectory estimator) need the same steps in all iterations, got "
                f"num_sampling_steps {self.num_sampling_steps}, num_sampling_steps_last {self.num_sampling_steps_last}"
            )
        if self.uncond_refresh > 1:
            raise ValueError(
                "recorded reverse processes (the trajectory estimator) need every guidance branch of every iteration, "
                f"got uncond_refresh {self.uncond_refresh}"
            )


def guidance(scale: float, config: SamplingConfig, num_tokens: int, next_masked: int) -> float:
    """The scale of one iteration, after which `next_masked` tokens stay hidden (at least 1 is counted, as MAR does)."""
    if config.cfg_schedule == "constant":
        return scale
    return 1 + (scale - 1) * (num_tokens - max(1, next_masked)) / num_tokens


def guidance_scales(config: SamplingConfig, num_tokens: int, next_masked: int) -> tuple[float, float]:
    """The scales of text and of layout in one iteration."""
    text, layout = (guidance(scale, config, num_tokens, next_masked) for scale in (config.cfg_text, config.cfg_layout))
    return text, layout
