"""How images are drawn, as plain values, and what these make of each iteration: head options, scales, branches.

Some options are one head's alone: reverse steps are the diffusion head's; top-k, top-p and the choice temperature are
the discrete head's. `default_sampling` gives the defaults of a head.

The options that spend less than MAR does, all off by default; each draws other images than the plain sampler:

- `num_sampling_steps_last`: fewer reverse steps the more is known of the image (DiSA, arXiv:2505.20297).
- `guidance_interval`: guidance in some iterations only (as arXiv:2404.07724 does over noise levels).
- `uncond_refresh`: guidance's other branches run in some iterations; in between, what the backbone's outputs differ by
  is taken from the last run (the condition cache of LazyMAR, arXiv:2503.12450).
- `order`: see `orders.py`.

Command lines name what stands here, so this file imports PyTorch only where it computes with it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from models.config import HEADS, MAX_SCALE, NUM_TRAIN_STEPS, require_reverse_steps
from models.sampling.few import require_few

if TYPE_CHECKING:
    from models.heads.diffusion_sampler import ReverseOptions
    from models.heads.discrete_sampler import CodeOptions
    from models.heads.few_step import FewOptions

ORDERS = ("random", "gtr", "halton", "halton_fixed", "raster", "confidence")
SCHEDULES = ("mar", "root", "linear", "square", "cosine", "arccos", "halton")
CFG_SCHEDULES = ("linear", "constant", "step_linear")
OPTIONS_OF_HEAD = {
    "diffusion": ("num_sampling_steps", "num_sampling_steps_last", "clip_x0", "t_max", "head_evals"),
    "discrete": ("choice_temperature", "top_k", "top_p"),
}
HEAD_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "diffusion": {},
    "discrete": {"num_iter": 8, "order": "confidence", "schedule": "arccos"},
}
CONTROL_OPTIONS = ("layout_schedule", "layout_scale", "drop_grounding_tokens", "mask_threshold", "start_step",
                   "auto_update", "negative_prompt")  # fmt: skip
OF_STAGE_3 = "stage 3, whose log-probabilities are of captions and boxes as they were given"
ANNEALED_T_MAX = 950  # few steps from t = 999 multiply errors of eps by thousands (models/heads/diffusion.py)
MAX_GUIDANCE, MAX_TEMPERATURE, MAX_CLIP_X0 = 100.0, 10.0, 1e6  # beyond, pictures are noise
MAX_CHOICE_TEMPERATURE = 1000.0
FIRST_RUNS = 5  # iterations in a row that run every branch before differences are reused

BranchUse = Literal["full only", "run", "reuse"]


@dataclass(frozen=True)
class SamplingConfig:
    """num_iter: backbone passes. num_sampling_steps: reverse steps per token. cfg_text scales the caption (or the class
    label), cfg_layout the boxes; 1 is no guidance. cfg_schedule: `linear` grows guidance with the share of unmasked
    tokens, `step_linear` with the iteration. temperature: of the noise of reverse steps, or what logits are divided by.
    clip_x0: bound of predicted tokens. t_max: timesteps above it are clipped; None: none are, but `ANNEALED_T_MAX`
    where steps are annealed.

    num_sampling_steps_last: reverse steps in the last iteration, linear from num_sampling_steps in the first; None: the
    same in all. guidance_interval: the share of iterations, from and up to, in which there is guidance.
    uncond_refresh: the other branches run in every so many-th of these, after `FIRST_RUNS`; 1: in all.

    head: whose options these are, of `HEADS`; those of the other head stay at their defaults. schedule: how many tokens
    an iteration unmasks (`schedules.py`). choice_temperature: of the noise on confidences in the first iteration, falls
    to 0 in the last; for order `confidence`. top_k: likeliest codes that are drawn from; top_p: of these the likeliest
    up to the first with which their share exceeds it; None: all.

    head_evals: how often the few-step head runs for a token (`heads/few_step.py`), instead of reverse steps, whose
    options then mean nothing; None: the reverse process. It has learned guidance with all else, so it takes none.

    prefix_k: tokens that are drawn before, row by row, one in an iteration at constant guidance; num_iter is then that
    of the others.

    What steers the layout (`controls.py`): layout_schedule: the share of the image that is visible up to which the
    layout counts in full, and over how much more it fades out; (1, 0): it always counts. layout_scale: strength of
    boxes that have none of their own. drop_grounding_tokens: boxes do not enter as a layout from the start.
    mask_threshold: from iteration start_step on, a box reaches where the caption's attention to its phrase, scaled to
    [0, 1], exceeds this; None: as given. auto_update: in every iteration from then on, not once.
    negative_prompt: what guidance leads away from instead of no caption.
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
    head: str = "diffusion"
    schedule: str = "mar"
    choice_temperature: float = 4.5
    top_k: int | None = None
    top_p: float | None = None
    prefix_k: int = 0
    layout_schedule: tuple[float, float] = (1.0, 0.0)
    layout_scale: float = 1.0
    drop_grounding_tokens: bool = False
    mask_threshold: float | None = None
    start_step: int | None = None
    auto_update: bool = False
    negative_prompt: str | None = None
    head_evals: int | None = None

    def __post_init__(self) -> None:
        for name, choices in (("head", HEADS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        self._require_own_options()
        if self.num_iter < 1:
            raise ValueError(f"num_iter must be at least 1, got {self.num_iter}")
        if self.prefix_k < 0:
            raise ValueError(f"prefix_k must not be negative, got {self.prefix_k}")
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
        self._require_layout_options()
        require_few(self)
        if self.uncond_refresh < 1:
            raise ValueError(f"uncond_refresh must be at least 1, got {self.uncond_refresh}")
        require_reverse_steps(self.num_sampling_steps, self.t_max)
        last = self.num_sampling_steps_last
        if last is not None and not 1 <= last <= NUM_TRAIN_STEPS:
            raise ValueError(f"num_sampling_steps_last must lie between 1 and {NUM_TRAIN_STEPS}, got {last}")

    def _require_layout_options(self) -> None:
        """Raises ValueError for values that steer nothing."""
        on, decay = self.layout_schedule
        if not (0 <= on <= 1 and 0 <= decay <= 1):
            raise ValueError(f"layout_schedule must be two numbers in [0, 1], got {on} and {decay}")
        if not 0 <= self.layout_scale <= MAX_SCALE:
            raise ValueError(f"layout_scale must lie in [0, {MAX_SCALE:g}], got {self.layout_scale}")
        if self.negative_prompt and not self.negative_prompt.strip():
            raise ValueError(f"negative_prompt is blank, got {self.negative_prompt!r}")
        if self.negative_prompt and self.cfg_text == 1:
            raise ValueError(
                f"negative_prompt {self.negative_prompt!r} is what guidance by the caption leads away from: it needs "
                "cfg_text other than 1"
            )
        if self.mask_threshold is None:
            for name, default in (("start_step", None), ("auto_update", False)):
                if getattr(self, name) != default:
                    raise ValueError(f"{name} {getattr(self, name)} needs mask_threshold, which it is a part of")
            return
        if not 0 <= self.mask_threshold < 1:
            raise ValueError(f"mask_threshold must lie in [0, 1), got {self.mask_threshold}")
        if self.start_step is None or not 1 <= self.start_step < self.num_iter:
            raise ValueError(
                f"mask_threshold {self.mask_threshold} needs start_step, an iteration from 1 to num_iter - 1 = "
                f"{self.num_iter - 1}, got {self.start_step}"
            )
        if self.prefix_k:
            raise ValueError(
                f"mask_threshold {self.mask_threshold} does not go with prefix_k {self.prefix_k}, which has iterations "
                "of its own"
            )

    def require_start(self, num_unknown: int) -> None:
        """Raises ValueError if so few unknown tokens, of an image with any, end before `start_step`."""
        if self.start_step is not None and 0 < num_unknown <= self.start_step:
            raise ValueError(
                f"start_step {self.start_step} is not reached where {num_unknown} tokens are unknown, which takes as "
                "many iterations at most"
            )

    def _require_own_options(self) -> None:
        """Raises ValueError for what does not go with the head."""
        defaults = {each.name: each.default for each in fields(self)}
        require_options_of(self.head, [name for name, default in defaults.items() if getattr(self, name) != default])
        if self.head == "diffusion" and not self.is_blind:
            raise ValueError(f"order {self.order} goes by confidence, which the {self.head} head does not have")
        if self.head == "discrete" and self.temperature == 0:
            raise ValueError(f"the {self.head} head divides by temperature, got 0; top_k 1 draws the likeliest code")
        if not 0 <= self.choice_temperature <= MAX_CHOICE_TEMPERATURE:
            raise ValueError(
                f"choice_temperature must lie in [0, {MAX_CHOICE_TEMPERATURE:g}], got {self.choice_temperature}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")

    def to_dict(self) -> dict[str, Any]:
        """As plain values: pairs are lists."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @property
    def is_annealed(self) -> bool:
        return self.num_sampling_steps_last is not None

    @property
    def is_blind(self) -> bool:
        """Whether the order of the tokens does not depend on what is drawn."""
        return self.order != "confidence"

    def head_options(self, iteration: int) -> ReverseOptions | FewOptions | CodeOptions:
        """What the head is told in an iteration (`HeadSampler.at`)."""
        share = iteration / max(1, self.num_iter - 1)
        if self.head == "discrete":
            from models.heads.discrete_sampler import CodeOptions

            choice = self.choice_temperature * (1 - share) if self.order == "confidence" else 0.0
            return CodeOptions(self.temperature, self.top_k, self.top_p, choice)
        if self.head_evals is not None:
            from models.heads.few_step import FewOptions

            return FewOptions(self.head_evals, self.temperature, self.clip_x0)
        from models.heads.diffusion_sampler import ReverseOptions

        first, last, t_max = self.num_sampling_steps, self.num_sampling_steps_last, self.t_max
        if last is None:
            return ReverseOptions(first, t_max, self.temperature, self.clip_x0)
        t_max = ANNEALED_T_MAX if t_max is None else t_max
        return ReverseOptions(round(first + (last - first) * share), t_max, self.temperature, self.clip_x0)

    @property
    def num_passes(self) -> int:
        """Iterations in all, with those of the prefix."""
        return self.prefix_k + self.num_iter

    @property
    def of_prefix(self) -> SamplingConfig:
        """The options of the iterations that draw the prefix."""
        return replace(
            self,
            num_iter=self.prefix_k,
            prefix_k=0,
            order="raster",
            cfg_schedule="constant",
            guidance_interval=(0.0, 1.0),
        )

    @property
    def of_rest(self) -> SamplingConfig:
        """The options of the iterations after the prefix."""
        return replace(self, prefix_k=0)

    def require_fitting(self, num_tokens: int) -> None:
        """Raises ValueError naming the numbers if there are too few tokens for prefix_k and num_iter."""
        if self.prefix_k > num_tokens:
            raise ValueError(f"prefix_k {self.prefix_k} is more than the number of tokens, {num_tokens}")
        from models.masking import require_fitting_iterations

        left = num_tokens - self.prefix_k
        if self.prefix_k and 0 < left < self.num_iter:
            raise ValueError(
                f"num_iter {self.num_iter} is more than the {left} tokens that prefix_k {self.prefix_k} leaves of "
                f"{num_tokens}"
            )
        if left:
            require_fitting_iterations(self.num_iter, left)

    def masked_counts(self, num_tokens: int) -> list[int]:
        """How many of `num_tokens` unknown tokens are masked before each iteration, and (0) at the end. Raises
        ValueError for fewer tokens than iterations."""
        from models.sampling.schedules import masked_counts

        return masked_counts(self.schedule, num_tokens, self.num_iter)

    def branch_uses(self, num_branches: int, changes: Collection[int] = ()) -> list[BranchUse]:
        """What becomes of guidance's branches in each iteration: only the full one counts, all run, or the other ones'
        difference to the full one is reused. changes: iterations whose conditions are others than those before, so that
        an earlier difference says nothing."""
        if num_branches == 1:
            return ["run"] * self.num_iter
        low, high = (share * self.num_iter for share in self.guidance_interval)
        uses: list[BranchUse] = []
        num_guided = 0
        for iteration in range(self.num_iter):
            if not low <= iteration < high:
                uses.append("full only")
                continue
            is_due = num_guided < FIRST_RUNS or (num_guided - FIRST_RUNS + 1) % self.uncond_refresh == 0
            uses.append("run" if is_due or iteration in changes else "reuse")
            num_guided += 1
        return uses

    def for_rollouts(self) -> SamplingConfig:
        """The same without a prefix and what steers the layout, and but for options of codes that `require_exact`
        refuses: their defaults, and a random order."""
        defaults: dict[str, Any] = {each.name: each.default for each in fields(self)}
        plain = replace(self.of_rest, **{name: defaults[name] for name in CONTROL_OPTIONS})
        if self.head != "discrete":
            return plain
        order = self.order if self.is_blind else "random"
        return replace(plain, order=order, top_k=None, top_p=None, uncond_refresh=1)

    @property
    def is_guided(self) -> bool:
        return (self.cfg_text, self.cfg_layout) != (1, 1)

    def unguided(self) -> SamplingConfig:
        """The same for weights that give guided predictions on their own."""
        return replace(self, cfg_text=1.0, cfg_layout=1.0, uncond_refresh=1)

    @property
    def controls(self) -> dict[str, Any]:
        """What steers the layout or the captions, without what is left at its default."""
        defaults = {each.name: each.default for each in fields(self)}
        given = {name: getattr(self, name) for name in CONTROL_OPTIONS}
        return {name: value for name, value in given.items() if value != defaults[name]}

    def require_uncontrolled(self, reason: str) -> None:
        """Raises ValueError that names the first of `controls`, and the reason why there may be none."""
        for name, value in self.controls.items():
            said = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise ValueError(f"{name} {said} does not go with {reason}")

    def require_exact(self) -> None:
        """Raises ValueError naming the option if what is drawn of codes has no exact log-probabilities."""
        self.require_uncontrolled(OF_STAGE_3)
        for name, is_exact, reason in (
            ("order", self.is_blind, "the choice of tokens would have a probability too: take random or halton"),
            ("top_k", self.top_k is None, "other weights may not be able to draw what was drawn"),
            ("top_p", self.top_p is None, "other weights may not be able to draw what was drawn"),
            ("uncond_refresh", self.uncond_refresh == 1, "every guidance branch of every iteration is needed"),
        ):
            if not is_exact:
                raise ValueError(f"{name} {getattr(self, name)} does not go with exact log-probabilities: {reason}")

    def require_traceable(self) -> None:
        """Raises ValueError if the reverse processes cannot be scored by their log-probabilities."""
        self.require_uncontrolled(OF_STAGE_3)
        if self.temperature == 0:
            raise ValueError("recording needs draws, which have no density at temperature 0")
        if self.head_evals is not None:
            raise ValueError(
                "recorded reverse processes (the trajectory estimator) need reverse steps, which a few-step head does "
                f"not take, got head_evals {self.head_evals}: take elbo"
            )
        if self.prefix_k:
            raise ValueError(f"recordings (stage 3) know no prefix, got prefix_k {self.prefix_k}")
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


def default_sampling(head: str, **options: Any) -> SamplingConfig:
    """The options of a head, of `HEADS`: its defaults, but for those that are given."""
    return SamplingConfig(**{"head": head, **HEAD_DEFAULTS[head], **options})


def require_options_of(head: str, given: Iterable[str]) -> None:
    """Raises ValueError if one of the options given, by name, is another head's alone."""
    for other, names in OPTIONS_OF_HEAD.items():
        foreign = [name for name in names if name in set(given)]
        if other != head and foreign:
            raise ValueError(f"{foreign[0]} is an option of the {other} head, but the head is {head}")


def guidance(scale: float, config: SamplingConfig, num_tokens: int, next_masked: int, iteration: int) -> float:
    """The scale of one iteration, after which `next_masked` tokens stay hidden (at least 1 is counted, as MAR does)."""
    if config.cfg_schedule == "constant":
        return scale
    if config.cfg_schedule == "step_linear":
        return 1 + (scale - 1) * (iteration / (config.num_iter - 1) if config.num_iter > 1 else 1.0)
    return 1 + (scale - 1) * (num_tokens - max(1, next_masked)) / num_tokens


def guidance_scales(config: SamplingConfig, num_tokens: int, next_masked: int, iteration: int) -> tuple[float, float]:
    """The scales of text and of layout in one iteration."""
    scales = (config.cfg_text, config.cfg_layout)
    text, layout = (guidance(scale, config, num_tokens, next_masked, iteration) for scale in scales)
    return text, layout
