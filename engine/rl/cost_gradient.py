"""What learning from the gradient of a reward costs, before it runs (engine/train/cost.py says the rest).

An update of n images, with F_r and B_r the forward and the backward pass of one image at the masks that training draws,
with r rows of the head for each hidden token, V and J decoder and detector with the gradient of their input:

    predictions   n * E[F_r + B_r]
    reference     n * E[F_1]          where there is an anchor
    decoder       n * V
    detectors     n * sum J
    rollout       n * (an image, sampled without gradients), where the states are the sampler's own

r is K for the reward, the steps to a clean token, and 1 for the anchor, which draws its own noise level.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.rl.cost import rollout_head_calls
from engine.train.cost import RunCost
from models.flops import PassFlops, ScoringFlops, mean_over_masks, meta_model, sampling_flops
from models.sampling.config import SamplingConfig
from models.structmar import StructMARConfig

LEFT_OUT = "the frozen text encoder, what changes pictures before the detector, evaluations"


def reward_gradient_cost(
    config: StructMARConfig,
    images: int,
    has_anchor: bool,
    decoder: PassFlops,
    detectors: Sequence[PassFlops],
    mask_schedule: str,
    mask_ratio_min: float,
    num_text_tokens: int,
    updates: int,
    accum_iter: int = 1,
    rollout: SamplingConfig | None = None,
    num_steps: int = 1,
) -> RunCost:
    """See the module's docstring. images: of a batch. decoder, detectors: of one image (models/frozen/flops.py).

    rollout: how contexts are sampled; None where they are real latents. num_steps: K.
    Raises ValueError for a count below 1.
    """
    model, read = meta_model(config), images * accum_iter
    scored = ScoringFlops(model, num_text_tokens)
    mean = mean_over_masks(scored, mask_schedule, mask_ratio_min, num_steps + has_anchor)
    reference = mean_over_masks(scored, mask_schedule, mask_ratio_min, 1)
    parts = {
        "predictions and their gradients": read * (mean.forward + mean.backward),
        "reference": read * reference.forward * has_anchor,
        "decoder": read * (decoder.forward + decoder.backward),
        "detectors": read * sum(each.forward + each.backward for each in detectors),
    }
    sampled = {} if rollout is None else {"rollout": read * sampling_flops(model, rollout, num_text_tokens)}
    return RunCost(
        images=read,
        parts=sampled | parts,
        learning_passes=accum_iter * (1 + has_anchor),
        updates=updates,
        left_out=LEFT_OUT,
        iterations=0 if rollout is None else rollout.num_iter,
        head_calls=0 if rollout is None else accum_iter * rollout_head_calls(rollout),
        rollout_passes=0 if rollout is None else accum_iter * rollout.num_iter,
    )
