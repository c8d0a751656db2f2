"""What learning from a teacher costs, and what every run says of its costs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.train.cost import RunCost, distillation_cost, few_step_cost
from models.flops import ScoringFlops, draw_flops, mean_over_masks, meta_model, row_flops
from models.masking import num_masked_at
from models.sampling.config import SamplingConfig
from tests.helpers import tiny

NUM_TEXT = 5
CONFIG = replace(tiny.CONFIG, img_size=16, encoder_depth=1, decoder_depth=1, diffloss_d=1)  # 16 tokens
GUIDED = SamplingConfig(num_iter=4, num_sampling_steps=5, cfg_text=6.0, cfg_layout=4.0)
MASKS = ("truncnorm", 0.1)


def test_the_mean_over_masks_is_that_of_the_masks_that_training_draws() -> None:
    flops = ScoringFlops(meta_model(CONFIG), NUM_TEXT)
    counts = [num_masked_at("linear", (step + 0.5) / 4, 16, 0.0) for step in range(4)]
    assert counts == [2, 6, 10, 14]
    mean = mean_over_masks(flops, "linear", 0.0, num_draws=3, num_quantiles=4)
    assert mean.forward == pytest.approx(sum(flops.at(m, 3 * m).forward for m in counts) / 4)
    assert mean.backward == pytest.approx(sum(flops.at(m, 3 * m).backward for m in counts) / 4)


def test_a_teacher_costs_a_forward_pass_for_each_branch() -> None:
    def parts(teacher: SamplingConfig, images: int = 3, accum_iter: int = 1) -> dict[str, float]:
        return dict(distillation_cost(CONFIG, teacher, images, 2, *MASKS, NUM_TEXT, 10, accum_iter).parts)

    mean = mean_over_masks(ScoringFlops(meta_model(CONFIG), NUM_TEXT), *MASKS, num_draws=2)
    three = parts(GUIDED)
    assert three == {
        "student": pytest.approx(3 * (mean.forward + mean.backward)),
        "teacher": pytest.approx(3 * 3 * mean.forward),
    }
    assert parts(replace(GUIDED, cfg_text=4.0))["teacher"] == pytest.approx(2 / 3 * three["teacher"])  # one scale
    assert parts(GUIDED, images=1, accum_iter=3) == three


def test_a_few_step_head_costs_its_teachers_draws_and_its_own() -> None:
    def parts(teacher: SamplingConfig = GUIDED, num_draws: int = 6) -> dict[str, float]:
        return dict(few_step_cost(CONFIG, teacher, 3, num_draws, *MASKS, NUM_TEXT, 10).parts)

    found, model = parts(), meta_model(CONFIG)
    row = row_flops(model, is_frozen_below=True)
    assert row.forward == row_flops(model).forward and row.backward < row_flops(model).backward
    backbone = mean_over_masks(ScoringFlops(model, NUM_TEXT), *MASKS, num_draws=0).forward
    assert found == {
        "frozen backbone": pytest.approx(3 * 3 * backbone),
        "teacher's draws": pytest.approx(3 * 6 * draw_flops(model, GUIDED, NUM_TEXT)),
        "few-step head": pytest.approx(3 * 6 * 7 / 3 * (row.forward + row.backward)),  # 1, 2 or 4 evaluations
    }
    unguided = parts(replace(GUIDED, cfg_text=1.0, cfg_layout=1.0), num_draws=12)
    assert unguided["frozen backbone"] == pytest.approx(found["frozen backbone"] / 3)
    assert unguided["few-step head"] == 2 * found["few-step head"]
    assert unguided["teacher's draws"] == pytest.approx(2 / 3 * found["teacher's draws"], rel=0.02)
    with pytest.raises(ValueError, match="num_draws must be at least 1, got 0"):
        parts(num_draws=0)


def test_a_run_says_what_it_costs_and_what_is_left_out() -> None:
    parts = {"student": 2e12, "teacher": 5e11, "nothing": 0.0}
    cost = RunCost(images=24, parts=parts, learning_passes=2, updates=1000, left_out="evaluations")
    assert cost.describe() == [
        "an update, per process: 24 images, no rollout; 2 TFLOP student + 500 GFLOP teacher in 2 backbone passes",
        "the run, per process: 1,000 updates, 24,000 images, 2.5 PFLOP",
        "not counted: evaluations",
    ]
    sampled = replace(cost, iterations=16, head_calls=400, rollout_passes=16)
    assert "24 images, 16 iterations, 400 head calls one after the other; " in sampled.describe()[0]
    assert "24,000 images, 400,000 head calls, 2.5 PFLOP" in sampled.describe()[1]
    with pytest.raises(ValueError, match="updates must be at least 1, got 0"):
        replace(cost, updates=0)
    with pytest.raises(ValueError, match="num_draws must be at least 1, got 0"):
        distillation_cost(CONFIG, GUIDED, 1, 0, *MASKS, NUM_TEXT, 1)
