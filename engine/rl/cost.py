"""What a stage-3 command costs, before it runs: images, sequential head calls, passes of the backbone, FLOPs.

An update of B prompts x G samples (n images) does, with F_i and D_i the forward and the backward pass of one image that
belongs to iteration i (`models/flops.py` counts them) and b_i its guidance branches:

    rollout  n * (an image, sampled)
    update   s * M * E[(old + reference + inner_epochs) * b_i * F_i + inner_epochs * D_i]

s = n images are scored (of the objective `best_of`, B), with M masks and K draws per token. Masks are stratified over
the L tokens, so iteration i, which leaves m_i tokens hidden, has the probability (m_i - m_{i+1}) / L in E. `elbo`
scores all m_i hidden tokens, without guidance (b_i = 1); `trajectory` and `exact` those that iteration i unmasked, with
it: other branches than the full one are forward passes only. With a pass for each iteration, `exact` has each once.

Left out: see `models/flops.py`; the frozen VAE, CLIP and detector, the SFT part of a mixed loss, evaluations, what
scoring saves in guidance branches without text or boxes, what `exact` saves in the last block, which it runs for scored
tokens alone, and what is saved where only a part of the model trains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

from engine.rl.settings import ESTIMATORS
from engine.train.cost import RunCost
from models.flops import PassFlops, ScoringFlops, meta_model, sampling_flops
from models.sampling.config import SamplingConfig
from models.sampling.guidance import choose_branches
from models.structmar import StructMAR, StructMARConfig
from util.units import format_count, format_duration

SKIPPED_STEPS = 2  # reverse steps at either end that `trajectory` never scores
ROLLOUT, SCORING = "rollout", "log-probabilities and gradients"  # parts of the cost
LEFT_OUT = "the frozen text encoder, image decoder and detector, the SFT part of a mixed loss, evaluations"


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
    has_old: bool = True,
    scored_of_group: int | None = None,
) -> RunCost:
    """See the module's docstring; prompts and updates are those of one process, with a caption and boxes each.

    num_draws: None for all reverse steps that `trajectory` may score; `exact` draws nothing. num_text_tokens: of a
    padded batch. accum_iter: batches of prompts in an update, rolled out and scored one after the other. has_old:
    whether the objective needs what the old policy says. scored_of_group: images of a group that are scored; None: all.
    Raises ValueError for an unknown estimator, a count below 1, or more masks than iterations.
    """
    draws = _scored_draws(estimator, num_draws, sampling.head_options(0).num_calls)
    sizes = {
        "prompts": prompts,
        "group_size": group_size,
        "inner_epochs": inner_epochs,
        "updates": updates,
        "accum_iter": accum_iter,
        "scored_of_group": group_size if scored_of_group is None else scored_of_group,
    }
    _check({"rl_masks": num_masks, "rl_draws": draws, **sizes}, sampling.num_iter)
    images, evaluations = accum_iter * prompts * group_size, has_old + has_reference + inner_epochs
    model = meta_model(config)
    scored = _mean_scoring(model, sampling, estimator, num_masks, draws, num_text_tokens)
    scoring = num_masks * (evaluations * scored.forward + inner_epochs * scored.backward)
    return RunCost(
        images=images,
        parts={
            ROLLOUT: images * sampling_flops(model, sampling, num_text_tokens),
            SCORING: accum_iter * prompts * sizes["scored_of_group"] * scoring,
        },
        learning_passes=accum_iter * num_masks * evaluations,
        updates=updates,
        left_out=LEFT_OUT,
        iterations=sampling.num_iter,
        head_calls=accum_iter * rollout_head_calls(sampling),
        rollout_passes=accum_iter * sampling.num_iter,
    )


def rollout_head_calls(sampling: SamplingConfig) -> int:
    """One after the other, each for all images of a batch."""
    return sum(sampling.head_options(iteration).num_calls for iteration in range(sampling.num_iter))


def _mean_scoring(
    model: StructMAR, sampling: SamplingConfig, estimator: str, num_masks: int, draws: int, num_text_tokens: int
) -> PassFlops:
    """The expectation over the iterations that a mask may belong to; `forward` is of all guidance branches."""
    num_tokens, is_elbo = math.prod(model.config.unit_grid()), estimator == "elbo"
    takes_each = estimator == "exact" and num_masks == sampling.num_iter
    branches = 1 if is_elbo else len(choose_branches(sampling, has_text=True, has_layout=True)[0])
    flops, forward, backward = ScoringFlops(model, num_text_tokens), 0.0, 0.0
    counts = sampling.masked_counts(num_tokens)
    for (now, after), use in zip(pairwise(counts), sampling.branch_uses(branches), strict=True):
        part = flops.at(now, draws * (now if is_elbo else now - after))
        share = 1 / sampling.num_iter if takes_each else (now - after) / num_tokens
        forward += share * part.forward * (1 if use == "full only" else branches)
        backward += share * part.backward
    return PassFlops(forward, backward)


def describe_time_left(seconds_per_update: float, updates_left: int) -> str:
    """What the measured time of an update means for the rest of the run. The first update includes warming up, so that
    its figure is an upper bound."""
    if not seconds_per_update > 0 or updates_left < 0:
        raise ValueError(f"need a positive time and updates_left >= 0, got {seconds_per_update} s, {updates_left}")
    one, total = format_duration(seconds_per_update), format_duration(seconds_per_update * updates_left)
    verb = "takes" if updates_left == 1 else "take"
    return f"an update took {one}: {format_count(updates_left, 'more update')} {verb} {total}"


def _scored_draws(estimator: str, num_draws: int | None, num_steps: int) -> int:
    if estimator not in ESTIMATORS:
        raise ValueError(f"rl_estimator must be one of {ESTIMATORS}, got {estimator!r}")
    if estimator == "exact":
        return 1
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
