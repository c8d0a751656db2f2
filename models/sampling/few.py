"""Sampling options of the few-step head (`models/heads/few_step.py`): what goes with them, and whose they are.

Command lines name what stands here, so this file imports nothing that takes long to import.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from models.config import MAX_HEAD_EVALS, StructMARConfig

if TYPE_CHECKING:
    from models.sampling.config import SamplingConfig

DEFAULT_EVALS = 2


def require_few(sampling: SamplingConfig) -> None:
    """Raises ValueError for a number of evaluations out of range, and for guidance beside it."""
    if sampling.head_evals is None:
        return
    if not 1 <= sampling.head_evals <= MAX_HEAD_EVALS:
        raise ValueError(f"head_evals must lie between 1 and {MAX_HEAD_EVALS}, got {sampling.head_evals}")
    for name in ("cfg_text", "cfg_layout"):
        if (scale := vars(sampling)[name]) != 1:
            raise ValueError(
                f"{name} {scale:g} does not go with head_evals {sampling.head_evals}: the few-step head draws with the "
                "guidance that it was taught, so the scales are 1"
            )


def require_head_of(sampling: SamplingConfig, config: StructMARConfig) -> None:
    """Raises ValueError naming both where the options are of a head that the model does not have."""
    if sampling.head != config.head:
        raise ValueError(f"these are options of the {sampling.head} head, the model has the {config.head} head")
    if sampling.head_evals is not None and not config.few_step_head:
        raise ValueError(
            f"head_evals {sampling.head_evals} needs a few-step head, and the model has none: main_mar.py --train_mode "
            "few_step adds it, and training on from weights that have it takes --few_step_head"
        )


def few_sampling(teacher: SamplingConfig, num_evals: int) -> SamplingConfig:
    """The options of a few-step head that was taught to draw as `teacher` does: its guidance and temperature are in the
    weights."""
    return replace(teacher.unguided(), head_evals=num_evals, temperature=1.0, num_sampling_steps_last=None)
