"""What an update costs, and what the user reads. How passes are counted: `tests/models/test_flops.py`."""

from dataclasses import replace
from itertools import pairwise

import pytest

from engine.rl.cost import ROLLOUT, SCORING, describe_time_left, estimate_cost
from engine.train.cost import RunCost
from models.flops import ScoringFlops, meta_model, sampling_flops
from models.masking import cosine_masked_counts
from models.sampling.config import SamplingConfig, default_sampling
from models.structmar import preset_config
from tests.helpers import tiny
from util.units import format_duration, format_flops

NUM_TEXT = 5
CONFIG = replace(tiny.CONFIG, img_size=16, encoder_depth=2, decoder_depth=1, diffloss_d=1)  # 16 tokens
SAMPLING = SamplingConfig(num_iter=3, num_sampling_steps=6)
HUGE = preset_config("mar_huge", num_categories=80, text_dim=512)

STEPS_16 = {"num_iter": 16, "num_sampling_steps": 25}
MINI = {"num_categories": 12, "text_dim": 128}
WRITTEN_OUT = {
    "mini": ("mar_mini", MINI, STEPS_16, (16, 4, "elbo", 4, 8, 1, True, 77, 100), 525248364544, 1529793904640),
    "mini, three branches, checkpointed": (
        "mar_mini",
        MINI | {"grad_checkpointing": True},
        STEPS_16 | {"cfg_text": 3.0, "cfg_layout": 5.0, "guidance_interval": (0.2, 0.8)},
        (2, 4, "trajectory", 16, None, 2, True, 20, 100, 2),
        278068011008,
        2217104637952,
    ),
    "mini, options that spend less": (
        "mar_mini",
        MINI | {"cross_attn_every": 2, "rope_mode": "off", "learned_pos": False},
        {"num_iter": 32, "num_sampling_steps": 50, "num_sampling_steps_last": 5, "uncond_refresh": 4}
        | {"cfg_text": 3.0, "cfg_layout": 3.0},
        (4, 2, "elbo", 2, 4, 3, False, 77, 7),
        131406528512,
        110576565248,
    ),
    "mini without text": (
        "mar_mini",
        {"num_categories": 12, "layout_fourier": False},
        STEPS_16 | {"cfg_text": 3.0, "cfg_layout": 3.0},
        (4, 4, "elbo", 4, 8, 1, True, 77, 100),
        239779381248,
        352370941952,
    ),
    "bare mini, checkpointed": (
        "mar_mini",
        {"rope_mode": "off", "grad_checkpointing": True},
        {"num_iter": 64, "num_sampling_steps": 10, "t_max": 950},
        (4, 4, "trajectory", 4, 3, 1, True, 0, 100, 3),
        685872513024,
        251757723648,
    ),
    "base, pooled text": (
        "mar_base",
        {"num_categories": 80, "text_dim": 768, "cross_attn_every": 0, "decoder_embed_dim": 480, "mlp_ratio": 3.0},
        {"num_iter": 64, "num_sampling_steps": 100, "cfg_layout": 3.0},
        (4, 4, "trajectory", 16, 10, 1, False, 77, 1000),
        141349118410752,
        79957870870528,
    ),
    "huge, guided, checkpointed": (
        "mar_huge",
        {"num_categories": 80, "text_dim": 512, "grad_checkpointing": True},
        {"num_iter": 256, "num_sampling_steps": 100, "cfg_text": 3.0, "cfg_layout": 3.0},
        (4, 4, "trajectory", 16, None, 1, True, 77, 206_950, 2),
        7725146995425280,
        2354108475375616,
    ),
}


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_counts_equal_the_arithmetic_written_out(name):
    """The numbers were computed by hand-written formulas for every product of the model, before passes were counted."""
    preset, sizes, options, arguments, rollout, scoring = WRITTEN_OUT[name]
    cost = estimate_cost(preset_config(preset, **sizes), SamplingConfig(**options), *arguments)
    assert cost.parts[ROLLOUT] == rollout
    assert cost.parts[SCORING] == pytest.approx(scoring, rel=1e-12)


def test_annealed_steps_are_fewer_head_calls():
    sampling = SamplingConfig(num_iter=4, num_sampling_steps=8, num_sampling_steps_last=2)
    cost = estimate_cost(CONFIG, sampling, 2, 3, "elbo", 3, 6, 2, True, NUM_TEXT, updates=10)
    assert cost.head_calls == 8 + 6 + 4 + 2


def test_an_elbo_update_adds_up():
    """The mean over the iterations that a mask may belong to, weighted with the tokens that each unmasks."""
    cost = estimate_cost(CONFIG, SAMPLING, 2, 3, "elbo", 3, 6, 2, True, NUM_TEXT, updates=10)
    counts = cosine_masked_counts(CONFIG.num_tokens, 3)
    flops, mean, backward = ScoringFlops(meta_model(CONFIG), NUM_TEXT), 0.0, 0.0
    for now, after in pairwise(counts):
        scored = flops.at(now, 6 * now)
        mean += scored.forward * (now - after) / 16
        backward += scored.backward * (now - after) / 16
    assert cost.parts[SCORING] == pytest.approx(6 * 3 * (4 * mean + 2 * backward))  # old, reference, two inner epochs
    assert cost.parts[ROLLOUT] == 6 * sampling_flops(meta_model(CONFIG), SAMPLING, NUM_TEXT)
    assert cost.total_flops == pytest.approx(10 * (cost.parts[ROLLOUT] + cost.parts[SCORING]))
    assert (cost.images, cost.iterations, cost.head_calls) == (6, 3, 18)
    assert (cost.rollout_passes, cost.learning_passes) == (3, 12)


def test_a_trajectory_update_scores_the_tokens_of_an_iteration_and_its_other_branches_forward_only():
    arguments = (2, 3, "trajectory", 4, None, 1, False, NUM_TEXT, 1)
    one = replace(SAMPLING, num_iter=16)  # every iteration unmasks one token
    flops, forward, backward = ScoringFlops(meta_model(CONFIG), NUM_TEXT), 0.0, 0.0
    for m in range(1, 17):
        part = flops.at(m, 6 - 4)  # six steps, two at either end skipped
        forward, backward = forward + part.forward / 16, backward + part.backward / 16
    plain = estimate_cost(CONFIG, one, *arguments)
    guided = estimate_cost(CONFIG, replace(one, cfg_text=3.0, cfg_layout=3.0), *arguments)
    assert plain.parts[SCORING] == pytest.approx(6 * 4 * (2 * forward + backward))  # old and one inner epoch
    assert guided.parts[SCORING] == pytest.approx(6 * 4 * (4 * forward + backward))


@pytest.mark.parametrize("trunk", [{"trunk": "mae"}, {"trunk": "single", "encoder_depth": 0, "patch_size": 2}])
def test_an_exact_update_scores_each_code_once(trunk):
    """A pass for each iteration, over the tokens that it unmasked; fewer passes are drawn in proportion to these."""
    codes = {"head": "discrete", "codebook_size": 50, "vae_embed_dim": 1, "code_dim": 8, "vae_stride": 2}
    config = replace(CONFIG, **({"patch_size": 2} | codes | trunk))
    sampling = default_sampling("discrete", num_iter=4, order="random", cfg_text=3.0, cfg_layout=3.0)
    flops, num_units = ScoringFlops(meta_model(config), NUM_TEXT), config.unit_grid()[0] * config.unit_grid()[1]
    parts = [flops.at(now, now - after) for now, after in pairwise(sampling.masked_counts(num_units))]
    forward, backward = sum(part.forward for part in parts), sum(part.backward for part in parts)
    cost = estimate_cost(config, sampling, 2, 3, "exact", 4, 1, 2, True, NUM_TEXT, updates=10)
    assert cost.parts[SCORING] == pytest.approx(6 * (4 * 2 * forward + 2 * backward))  # two branches each
    assert cost.parts[ROLLOUT] == 6 * sampling_flops(meta_model(config), sampling, NUM_TEXT)
    assert (cost.head_calls, cost.rollout_passes, cost.learning_passes) == (4, 4, 4 * 4)
    some = estimate_cost(config, sampling, 2, 3, "exact", 2, 1, 2, True, NUM_TEXT, updates=10)
    assert 0.4 * cost.parts[SCORING] < some.parts[SCORING] < 0.6 * cost.parts[SCORING]


def test_accumulated_batches_follow_one_another():
    """Twice the prompts at once, or in two batches: the same images and FLOPs, but twice the calls."""
    at_once = estimate_cost(CONFIG, SAMPLING, 4, 3, "elbo", 3, 6, 2, True, NUM_TEXT, updates=10)
    in_turn = estimate_cost(CONFIG, SAMPLING, 2, 3, "elbo", 3, 6, 2, True, NUM_TEXT, updates=10, accum_iter=2)
    assert (in_turn.images, in_turn.update_flops) == (at_once.images, at_once.update_flops)
    assert in_turn.head_calls == 2 * at_once.head_calls
    assert in_turn.rollout_passes == 2 * at_once.rollout_passes
    assert in_turn.learning_passes == 2 * at_once.learning_passes


def test_the_reference_and_each_inner_epoch_cost_what_they_do():
    def cost(inner_epochs: int, has_reference: bool) -> float:
        found = estimate_cost(CONFIG, SAMPLING, 1, 2, "elbo", 2, 4, inner_epochs, has_reference, NUM_TEXT, 1)
        return found.parts[SCORING]

    forward = cost(1, True) - cost(1, False)
    assert cost(3, False) - cost(2, False) == pytest.approx(cost(2, False) - cost(1, False))
    assert 2.7 * forward < cost(2, False) - cost(1, False) < 3 * forward


def test_an_objective_scores_as_many_images_and_policies_as_it_needs():
    def cost(**changes) -> RunCost:
        return estimate_cost(CONFIG, SAMPLING, 2, 4, "elbo", 2, 4, 1, False, NUM_TEXT, 1, **changes)

    everything, best, on_policy = cost(), cost(scored_of_group=1), cost(has_old=False)
    assert best.parts[SCORING] == pytest.approx(everything.parts[SCORING] / 4)
    assert best.parts[ROLLOUT] == everything.parts[ROLLOUT] and best.images == 8
    assert (everything.learning_passes, on_policy.learning_passes) == (4, 2)
    assert on_policy.parts[SCORING] < everything.parts[SCORING] < 2 * on_policy.parts[SCORING]


def test_the_huge_model_on_the_papers_command():
    """16 images, 256 iterations of 100 steps: 130 + 8 TFLOP an image by an independent count of the whole backbone, of
    which the sampler computes caption keys and values once (3.4 % of it) and the last block where needed (2.5 %)."""
    cost = estimate_cost(HUGE, SamplingConfig(256, 100), 4, 4, "elbo", 4, 8, 1, True, 77, updates=206_950)
    assert cost.parts[ROLLOUT] / 16 == pytest.approx(137.7e12 * (1 - 0.034 - 0.025), rel=0.02)
    assert (cost.parts[ROLLOUT], cost.parts[SCORING]) == (
        2072491988090880,
        pytest.approx(258393768067072, rel=1e-12),
    )
    assert cost.head_calls == 25_600
    lines = cost.describe()
    for part in ("16 images", "256 iterations", "25,600 head calls", "2.07 PFLOP rollout"):
        assert part in lines[0]
    for part in ("206,950 updates", "3,311,200 images", "EFLOP"):
        assert part in lines[1]


def test_numbers_are_written_in_fitting_units():
    assert [format_flops(flops) for flops in (2.2e15, 3.14159e12, 5e5)] == ["2.2 PFLOP", "3.14 TFLOP", "0.5 MFLOP"]
    assert format_flops(1.5e21) == "1,500 EFLOP"
    durations = [format_duration(seconds) for seconds in (1.26, 41.2, 720, 12_240, 846_720)]
    assert durations == ["1.3 s", "41 s", "12 minutes", "3.4 hours", "9.8 days"]
    assert describe_time_left(41.0, 20_694) == "an update took 41 s: 20,694 more updates take 9.8 days"
    assert describe_time_left(41.0, 1) == "an update took 41 s: 1 more update takes 41 s"


def test_bad_values_are_refused():
    counts = {"prompts": 1, "group_size": 2, "num_masks": 2, "num_draws": 4, "inner_epochs": 1, "updates": 1}
    good = {"estimator": "elbo", "has_reference": True, "num_text_tokens": NUM_TEXT, **counts}
    for changes, message in (
        ({"estimator": "guess"}, "rl_estimator .* 'guess'"),
        ({"num_draws": None}, "rl_draws .* None"),
        ({"num_masks": 8}, "rl_masks 8 .* num_iter 3"),
        ({"group_size": 0}, "group_size .* 0"),
        ({"inner_epochs": 0}, "inner_epochs .* 0"),
        ({"estimator": "trajectory", "num_draws": 5}, "6 reverse steps leave 2 .* rl_draws is 5"),
    ):
        with pytest.raises(ValueError, match=message):
            estimate_cost(CONFIG, SAMPLING, **(good | changes))
    with pytest.raises(ValueError, match="positive time .* 0"):
        describe_time_left(0.0, 5)
