"""What a stage-3 command costs, before it runs: images, sequential head calls, passes of the backbone, operations.

One multiply-add is two operations. An update of B prompts x G samples (n images) does, with R(m) the operations of a
backbone pass that hides m of L tokens, and H those of the head for one row:

    rollout  n * branches * (sum_i R'(m_i) + L * S * H')          m_i: the cosine schedule, S reverse steps (the same
                                                                  in all iterations here, and all branches run)
    scoring  n * M * E[R(m) + p * K * H]                          one evaluation of the log-probabilities
    update   scoring * (old + reference + inner_epochs * (forward + backward + recomputation))

R' and H' are less than R and H by what the sampler does once instead of every time (`models/context.py`).
M masks, p tokens scored per mask, K draws per token. Masks are stratified over the token index, so iteration i has the
probability (m_i - m_{i+1}) / L in E. `elbo` scores all m_i hidden tokens, without guidance; `trajectory` those that
iteration i uncovered, with it: other branches than the full one are forward passes only. A backward pass is two
forwards, less the gradients of inputs that need none; a recomputation (`grad_checkpointing`) is one of the blocks.

Left out: element-wise work, the frozen VAE, CLIP and detector, the SFT part of a mixed loss, evaluations, what a
rollout does once per batch, what scoring saves in guidance branches without text or boxes, and what is saved where only
a part of the model trains.

Shape letters: B prompts, G samples per prompt, n = B * G images, L tokens, D width, K buffer slots in a sequence,
T text tokens, C token channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from models.heads.adaln_mlp import TIME_FREQUENCIES
from models.layout import NUM_FREQUENCIES
from models.masking import cosine_masked_counts
from models.sampling.condition_cache import end_of_run
from models.sampling.config import SamplingConfig
from models.structmar import StructMARConfig

ESTIMATORS = ("elbo", "trajectory")
SKIPPED_STEPS = 2  # reverse steps at either end that `trajectory` never scores
UNITS = ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))


@dataclass(frozen=True)
class Operations:
    """Of one forward pass, in matrix products. forward: all of them; data: those part of `forward` whose input needs no
    gradient; repeated: those that `grad_checkpointing` runs again (a block's last linear is not: nobody needs its
    output again)."""

    forward: float = 0.0
    data: float = 0.0
    repeated: float = 0.0

    def __add__(self, other: Operations) -> Operations:
        return Operations(self.forward + other.forward, self.data + other.data, self.repeated + other.repeated)

    def __mul__(self, times: float) -> Operations:
        return Operations(self.forward * times, self.data * times, self.repeated * times)

    def gradients(self, grad_checkpointing: bool) -> float:
        """Of the backward pass: a product for the weights, one for the input, and the recomputation."""
        return 2 * self.forward - self.data + (self.repeated if grad_checkpointing else 0.0)


@dataclass(frozen=True)
class RlCost:
    """Of one process. *_flops are of one update; the other counts too, except `updates`, the length of the run.

    head_calls: of the rollout, one after the other, each for all images of a batch: with small models their number, not
    their size, is what takes the time. rollout_passes, scoring_passes: backbone passes of a whole batch (with all
    guidance branches); scoring_passes counts old, reference and every inner epoch, a pass with its backward as one.
    """

    images: int
    iterations: int
    head_calls: int
    rollout_passes: int
    scoring_passes: int
    rollout_flops: float
    scoring_flops: float
    updates: int

    @property
    def update_flops(self) -> float:
        """The whole update: rollout, old and reference log-probabilities, inner epochs."""
        return self.rollout_flops + self.scoring_flops

    @property
    def total_flops(self) -> float:
        return self.update_flops * self.updates

    def describe(self) -> list[str]:
        """What a user reads before the run, one log line each."""
        return [
            f"an update, per process: {_count(self.images, 'image')}, {_count(self.iterations, 'iteration')}, "
            f"{_count(self.head_calls, 'head call')} one after the other; {format_flops(self.rollout_flops)} rollout + "
            f"{format_flops(self.scoring_flops)} log-probabilities and gradients in "
            f"{_count(self.scoring_passes, 'backbone pass', 'es')}",
            f"the run, per process: {_count(self.updates, 'update')}, {_count(self.images * self.updates, 'image')}, "
            f"{_count(self.head_calls * self.updates, 'head call')}, {format_flops(self.total_flops)}",
        ]


def estimate_cost(
    config: StructMARConfig,
    sampling: SamplingConfig,
    prompts: int,
    group_size: int,
    estimator: str,
    num_masks: int,
    num_draws: int | None,
    inner_epochs: int,
    has_reference: bool,
    num_text_tokens: int,
    updates: int,
    accum_iter: int = 1,
) -> RlCost:
    """See the module's docstring; prompts and updates are those of one process, with a caption and boxes each.

    num_draws: None for all reverse steps that `trajectory` may score. num_text_tokens: of a padded batch. accum_iter:
    batches of prompts in an update, rolled out and scored one after the other.
    Raises ValueError for an unknown estimator, a count below 1, or more masks than iterations.
    """
    draws = _scored_draws(estimator, num_draws, sampling.num_reverse_steps)
    sizes = {
        "prompts": prompts,
        "group_size": group_size,
        "inner_epochs": inner_epochs,
        "updates": updates,
        "accum_iter": accum_iter,
    }
    _check({"rl_masks": num_masks, "rl_draws": draws, **sizes}, sampling.num_iter)
    images = accum_iter * prompts * group_size
    rollout = rollout_flops(config, sampling, num_text_tokens)

    full, guided = _mean_scoring(config, sampling, estimator, draws, num_text_tokens)
    branches = num_branches(sampling) if estimator == "trajectory" else 1
    evaluation = full.forward + (branches - 1) * guided.forward
    gradients = full.gradients(config.grad_checkpointing)
    evaluations = 1 + has_reference + inner_epochs
    scoring = num_masks * (evaluations * evaluation + inner_epochs * gradients)
    return RlCost(
        images=images,
        iterations=sampling.num_iter,
        head_calls=accum_iter * sum(steps_of_iterations(sampling)),
        rollout_passes=accum_iter * sampling.num_iter,
        scoring_passes=accum_iter * num_masks * evaluations,
        rollout_flops=images * rollout,
        scoring_flops=images * scoring,
        updates=updates,
    )


def describe_time_left(seconds_per_update: float, updates_left: int) -> str:
    """What the measured time of an update means for the rest of the run. The first update includes warming up, so that
    its figure is an upper bound."""
    if not seconds_per_update > 0 or updates_left < 0:
        raise ValueError(f"need a positive time and updates_left >= 0, got {seconds_per_update} s, {updates_left}")
    total = format_duration(seconds_per_update * updates_left)
    verb = "takes" if updates_left == 1 else "take"
    return f"an update took {format_duration(seconds_per_update)}: {_count(updates_left, 'more update')} {verb} {total}"


def format_duration(seconds: float) -> str:
    """In the largest unit that leaves at least one: "41 s", "12 minutes", "3.4 hours", "9.8 days"."""
    for size, unit, digits in ((86400, "days", 1), (3600, "hours", 1), (60, "minutes", 0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def format_flops(flops: float) -> str:
    """With three significant digits in a fitting unit: "2.2e15" is "2.2 PFLOP"."""
    size, unit = next((pair for pair in UNITS if flops >= pair[0]), UNITS[-1])
    return f"{flops / size:.3g} {unit}" if flops < 1000 * size else f"{flops / size:,.0f} {unit}"


def num_branches(sampling: SamplingConfig) -> int:
    """Guidance branches of an image with a caption and boxes, as `embed_branches` makes them."""
    return 1 + (sampling.cfg_text != sampling.cfg_layout) + (sampling.cfg_text != 1.0)


def steps_of_iterations(sampling: SamplingConfig) -> list[int]:
    """Reverse steps per token in each iteration."""
    return [sampling.at(iteration).num_reverse_steps for iteration in range(sampling.num_iter)]


def rollout_flops(config: StructMARConfig, sampling: SamplingConfig, num_text_tokens: int) -> float:
    """Of one image with a caption and boxes. The branch without a caption has no cross-attention to compute."""
    counts = cosine_masked_counts(config.num_tokens, sampling.num_iter)
    branches, context = num_branches(sampling), num_text_tokens + 1  # the learned null token stands in front
    uses = sampling.branch_uses(branches)
    without_text = int(sampling.cfg_text != 1.0)
    with_text = branches - without_text
    total: float = 0
    for iteration, ((now, after), use, num_steps) in enumerate(
        zip(pairwise(counts), uses, steps_of_iterations(sampling), strict=True)
    ):
        asked = now - counts[end_of_run(uses, iteration)]
        if use == "run":
            total += with_text * _sampling_pass(config, now, asked, context)
            total += without_text * _sampling_pass(config, now, asked, 0)
        else:
            total += _sampling_pass(config, now, now - after, context)
        counted = 1 if use == "full only" else branches
        total += (now - after) * _sampled_token(config, num_steps, counted)
    pooled = _linear(1, config.text_dim, config.encoder_embed_dim)
    captions = with_text * (pooled + _caption_keys(config, context))
    boxes = _conditions(config).forward - pooled
    return captions + boxes + total


def _caption_keys(config: StructMARConfig, context: int) -> int:
    """Keys and values of the caption in every block, once per image."""
    parts = ((config.encoder_depth, config.encoder_embed_dim), (config.decoder_depth, config.decoder_embed_dim))
    return sum(
        _linear(context, config.text_dim, 2 * width)
        for depth, width in parts
        for block in range(depth)
        if config.has_cross_attention(block)
    )


def _sampling_pass(config: StructMARConfig, num_masked: int, num_drawn: int, context: int) -> int:
    """One pass over one image that asks for `num_drawn` tokens: the last block computes no others.

    context: tokens that the cross-attention sees; 0: it is a constant.
    """
    width, decoder_width = config.encoder_embed_dim, config.decoder_embed_dim
    visible = config.num_tokens - num_masked
    encoder_length, decoder_length = config.buffer_size + visible, config.buffer_size + config.num_tokens
    total = _linear(visible, config.token_dim, width) + _linear(encoder_length, width, decoder_width)
    for depth, length, size, asked in (
        (config.encoder_depth, encoder_length, width, encoder_length),
        (config.decoder_depth, decoder_length, decoder_width, num_drawn),
    ):
        for block in range(depth):
            queries = asked if block == depth - 1 else length
            total += _linear(length, size, 3 * size) + _linear(queries, size, size) + 4 * length * queries * size
            total += 2 * _linear(queries, size, int(size * config.mlp_ratio))
            if config.has_cross_attention(block) and context:
                total += 2 * _linear(queries, size, size) + 4 * queries * context * size
    return total


def _sampled_token(config: StructMARConfig, num_steps: int, branches: int) -> int:
    """The reverse process of one token: its condition is embedded once, the noisy token for all branches together."""
    width, depth, channels = config.diffloss_w, config.diffloss_d, config.token_dim
    block = 2 * _linear(1, width, width) + _linear(1, width, 3 * width)
    final = _linear(1, width, 2 * width) + _linear(1, width, 2 * channels)
    condition = _linear(1, config.decoder_embed_dim, width)
    return branches * (condition + num_steps * (depth * block + final)) + num_steps * _linear(1, channels, width)


def scoring_flops(config: StructMARConfig, num_masked: int, num_rows: int, num_text_tokens: int) -> Operations:
    """One forward pass of one image: the backbone with `num_masked` tokens hidden, the head on `num_rows` rows."""
    backbone = _backbone(config, num_masked, num_text_tokens)
    return _conditions(config) + backbone + _head_row(config) * num_rows


def _mean_scoring(
    config: StructMARConfig, sampling: SamplingConfig, estimator: str, draws: int, num_text_tokens: int
) -> tuple[Operations, Operations]:
    """The expectation of `scoring_flops` over the iterations that a mask may belong to, and the part of it that has
    guidance (in some iterations it may be off)."""
    counts = cosine_masked_counts(config.num_tokens, sampling.num_iter)
    mean, guided = Operations(), Operations()
    for (now, after), use in zip(pairwise(counts), sampling.branch_uses(num_branches(sampling)), strict=True):
        scored = now if estimator == "elbo" else now - after
        share = (now - after) / config.num_tokens
        part = scoring_flops(config, now, scored * draws, num_text_tokens) * share
        mean = mean + part
        guided = guided + part * (use != "full only")
    return mean, guided


def _conditions(config: StructMARConfig) -> Operations:
    """Caption and boxes into the base token and the layout tokens, once per call of the model."""
    width = config.encoder_embed_dim
    box_dim = 4 * 2 * NUM_FREQUENCIES if config.layout_fourier else 4
    pooled = _linear(1, config.text_dim, width)
    if not config.num_categories:
        return Operations(pooled, data=pooled)
    boxes = _linear(config.max_objects, box_dim, width)
    return Operations(pooled + boxes + _linear(config.max_objects, width, width), data=pooled + boxes)


def _backbone(config: StructMARConfig, num_masked: int, num_text_tokens: int) -> Operations:
    """One pass over one image, encoder and decoder."""
    width, decoder_width = config.encoder_embed_dim, config.decoder_embed_dim
    visible = config.num_tokens - num_masked
    encoder_length, decoder_length = config.buffer_size + visible, config.buffer_size + config.num_tokens
    tokens = _linear(visible, config.token_dim, width)
    total = Operations(tokens + _linear(encoder_length, width, decoder_width), data=tokens)
    context = num_text_tokens + 1  # the learned null token stands in front
    for depth, length, size in (
        (config.encoder_depth, encoder_length, width),
        (config.decoder_depth, decoder_length, decoder_width),
    ):
        num_cross = sum(config.has_cross_attention(block) for block in range(depth))
        total = total + _block(length, size, config.mlp_ratio) * depth
        total = total + _cross_attention(length, size, context, config.text_dim) * num_cross
    return total


def _block(length: int, width: int, mlp_ratio: float) -> Operations:
    """Queries, keys, values and output; products with keys and values; the MLP."""
    last = _linear(length, int(width * mlp_ratio), width)
    linears = _linear(length, width, 3 * width) + _linear(length, width, width) + last
    repeated = linears + 4 * length**2 * width
    return Operations(repeated + last, repeated=repeated)


def _cross_attention(length: int, width: int, context: int, text_dim: int) -> Operations:
    text = _linear(context, text_dim, 2 * width)  # the null token alone learns through it
    total = text + 2 * _linear(length, width, width) + 4 * length * context * width
    return Operations(total, repeated=total)


def _head_row(config: StructMARConfig) -> Operations:
    """The diffusion head on one noisy token."""
    width, channels = config.diffloss_w, config.token_dim
    data = _linear(1, TIME_FREQUENCIES, width) + _linear(1, channels, width)
    condition = _linear(1, width, width) + _linear(1, config.decoder_embed_dim, width)
    blocks = config.diffloss_d * (2 * _linear(1, width, width) + _linear(1, width, 3 * width))
    final = _linear(1, width, 2 * width) + _linear(1, width, 2 * channels)
    return Operations(data + condition + blocks + final, data=data, repeated=blocks)


def _linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def _scored_draws(estimator: str, num_draws: int | None, num_steps: int) -> int:
    if estimator not in ESTIMATORS:
        raise ValueError(f"rl_estimator must be one of {ESTIMATORS}, got {estimator!r}")
    if estimator == "elbo":
        if num_draws is None:
            raise ValueError("rl_draws must be a number for the elbo estimator, got None")
        return num_draws
    allowed = num_steps - 2 * SKIPPED_STEPS
    if allowed < 1 or (num_draws or 0) > allowed:
        raise ValueError(
            f"{num_steps} reverse steps leave {max(0, allowed)} to score ({SKIPPED_STEPS} at either end are skipped), "
            f"but rl_draws is {num_draws}"
        )
    return allowed if num_draws is None else num_draws


def _check(counts: Mapping[str, int], num_iter: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if counts["rl_masks"] > num_iter:
        raise ValueError(f"rl_masks {counts['rl_masks']} is more than num_iter {num_iter}")


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else plural}"
