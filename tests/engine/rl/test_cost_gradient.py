"""What the gradient of a reward costs: no rollout, and each frozen part once with its gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from engine.rl.cost_gradient import reward_gradient_cost
from models.flops import PassFlops, ScoringFlops, mean_over_masks, meta_model, sampling_flops
from models.sampling.config import SamplingConfig
from tests.helpers import tiny

NUM_TEXT = 5
CONFIG = replace(tiny.CONFIG, img_size=16, encoder_depth=1, decoder_depth=1, diffloss_d=1)  # 16 tokens
MASKS = ("truncnorm", 0.1)
GIVEN: dict[str, Any] = {
    "config": CONFIG,
    "images": 4,
    "has_anchor": True,
    "decoder": PassFlops(1e6, 2e6),
    "detectors": [PassFlops(5e6, 6e6)],
    "mask_schedule": "truncnorm",
    "mask_ratio_min": 0.1,
    "num_text_tokens": NUM_TEXT,
    "updates": 7,
}


def test_an_update_adds_up() -> None:
    cost = reward_gradient_cost(**GIVEN)
    flops = ScoringFlops(meta_model(CONFIG), NUM_TEXT)
    mean = mean_over_masks(flops, *MASKS, num_draws=2)  # the reward's noise level and the anchor's
    reference = mean_over_masks(flops, *MASKS, num_draws=1)
    assert cost.parts == {
        "predictions and their gradients": pytest.approx(4 * (mean.forward + mean.backward)),
        "reference": pytest.approx(4 * reference.forward),
        "decoder": 12e6,
        "detectors": 44e6,
    }
    assert (cost.images, cost.learning_passes, cost.head_calls) == (4, 2, 0)
    assert "4 images, no rollout; " in cost.describe()[0]
    longer = reward_gradient_cost(**GIVEN, num_steps=3).parts["predictions and their gradients"]
    mean = mean_over_masks(flops, *MASKS, num_draws=4)
    assert longer == pytest.approx(4 * (mean.forward + mean.backward))


def test_without_an_anchor_there_is_no_reference_and_every_detector_of_an_ensemble_counts() -> None:
    cost = reward_gradient_cost(**GIVEN | {"has_anchor": False, "detectors": [PassFlops(5e6, 6e6)] * 3})
    assert cost.parts["reference"] == 0 and cost.parts["detectors"] == 3 * 44e6
    assert cost.learning_passes == 1 and "reference" not in cost.describe()[0]


def test_contexts_of_its_own_are_sampled_first() -> None:
    short = SamplingConfig(num_iter=4, num_sampling_steps=5)
    cost = reward_gradient_cost(**GIVEN, accum_iter=2, rollout=short)
    assert cost.parts["rollout"] == 8 * sampling_flops(meta_model(CONFIG), short, NUM_TEXT)
    assert (cost.images, cost.iterations, cost.head_calls, cost.rollout_passes) == (8, 4, 2 * 4 * 5, 2 * 4)
