"""The cost formulas against PyTorch's own counter, on the meta device, and what the user reads."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.rl.cost import (
    describe_time_left,
    estimate_cost,
    format_duration,
    format_flops,
    rollout_flops,
    scoring_flops,
)
from models.masking import cosine_masked_counts
from models.sampling.config import SamplingConfig
from models.sampling.sampler import sample
from models.structmar import StructMAR, StructMARConfig, preset_config
from tests.helpers import tiny
from util.types import LayoutBatch, TextContext

META = torch.device("meta")
NUM_TEXT = 5
CONFIG = replace(tiny.CONFIG, img_size=16, encoder_depth=2, decoder_depth=1, diffloss_d=1)  # 16 tokens
MAR_CONFIG = replace(tiny.MAR_CONFIG, img_size=16, encoder_depth=1)
SAMPLING = SamplingConfig(num_iter=3, num_sampling_steps=6)
SHORT = SamplingConfig(num_iter=2, num_sampling_steps=3)
HUGE = preset_config("mar_huge", num_categories=80, text_dim=512)


def conditions(config: StructMARConfig, n: int) -> tuple[TextContext | None, LayoutBatch | None]:
    slots = (n, config.max_objects)
    layout = LayoutBatch(
        torch.zeros(*slots, 4, device=META),
        torch.zeros(slots, dtype=torch.int64, device=META),
        torch.ones(slots, dtype=torch.bool, device=META),
    )
    text = TextContext(
        torch.zeros(n, NUM_TEXT, config.text_dim, device=META),
        torch.ones(n, NUM_TEXT, dtype=torch.bool, device=META),
        torch.zeros(n, config.text_dim, device=META),
    )
    return text if config.text_dim else None, layout if config.num_categories else None


def build(config: StructMARConfig) -> StructMAR:
    with META:
        return StructMAR(config)


def counted_rollout(config: StructMARConfig, sampling: SamplingConfig, n: int) -> int:
    model = build(config).eval()
    text, layout = conditions(config, n)
    generators = [torch.Generator().manual_seed(seed) for seed in range(n)]
    with FlopCounterMode(display=False) as counter:
        sample(model, sampling, generators, text=text, layout=layout)
    return counter.get_total_flops()


def counted_scoring(config: StructMARConfig, n: int, m: int, p: int, draws: int) -> tuple[int, int]:
    """(forward, backward and recomputation) of n images with m tokens hidden, p of them scored `draws` times each."""
    model = build(config).eval()
    text, layout = conditions(config, n)
    kept_ids = torch.zeros(n, config.num_tokens - m, dtype=torch.int64, device=META)
    token_ids = torch.zeros(n, p, dtype=torch.int64, device=META)
    tokens = torch.zeros(n, config.num_tokens, config.token_dim, device=META)
    noisy = torch.zeros(n, p, draws, config.token_dim, device=META)
    timesteps = torch.zeros(n, p, draws, dtype=torch.int64, device=META)
    with FlopCounterMode(display=False) as counter:
        output = model.denoise(tokens, kept_ids, token_ids, noisy, timesteps, text=text, layout=layout)
        forward = counter.get_total_flops()
        output.sum().backward()
    return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        MAR_CONFIG,
        replace(CONFIG, cross_attn_every=2, layout_fourier=False, decoder_embed_dim=64, mlp_ratio=2.0),
    ],
    ids=["all parts", "bare MAR", "odd sizes"],
)
@pytest.mark.parametrize("grad_checkpointing", [False, True])
def test_forward_and_backward_equal_what_the_counter_counts(config, grad_checkpointing):
    config = replace(config, grad_checkpointing=grad_checkpointing)
    forward, backward = counted_scoring(config, n=2, m=10, p=5, draws=4)
    num_text = NUM_TEXT if config.text_dim else 0
    estimated = scoring_flops(config, num_masked=10, num_rows=5 * 4, num_text_tokens=num_text)
    assert 2 * estimated.forward == forward
    assert 2 * estimated.gradients(grad_checkpointing) == backward


def counted_per_image(config: StructMARConfig, sampling: SamplingConfig) -> int:
    """What a further image adds: some work is done once per batch."""
    return counted_rollout(config, sampling, 2) - counted_rollout(config, sampling, 1)


def test_an_unguided_rollout_equals_what_the_counter_counts():
    assert rollout_flops(CONFIG, SHORT, NUM_TEXT) == counted_per_image(CONFIG, SHORT)
    assert 3 * rollout_flops(CONFIG, SHORT, NUM_TEXT) == pytest.approx(counted_rollout(CONFIG, SHORT, 3), rel=0.02)
    cut = replace(SHORT, t_max=400)  # merges steps
    assert rollout_flops(CONFIG, cut, NUM_TEXT) == counted_per_image(CONFIG, cut)
    assert rollout_flops(CONFIG, cut, NUM_TEXT) < rollout_flops(CONFIG, SHORT, NUM_TEXT)


@pytest.mark.parametrize(("cfg_text", "cfg_layout", "branches"), [(3.0, 3.0, 2), (1.0, 3.0, 2), (3.0, 5.0, 3)])
def test_a_guided_rollout_counts_every_branch(cfg_text, cfg_layout, branches):
    sampling = replace(SHORT, cfg_text=cfg_text, cfg_layout=cfg_layout)
    estimated = rollout_flops(CONFIG, sampling, NUM_TEXT)
    assert estimated == counted_per_image(CONFIG, sampling)
    assert estimated == pytest.approx(branches * rollout_flops(CONFIG, SHORT, NUM_TEXT), rel=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"num_sampling_steps": 6, "num_sampling_steps_last": 2},
        {"guidance_interval": (0.2, 0.8), "cfg_text": 3.0, "cfg_layout": 3.0},
        {"uncond_refresh": 3, "cfg_text": 3.0, "cfg_layout": 5.0},
    ],
    ids=str,
)
def test_options_that_spend_less(options):
    sampling = replace(SamplingConfig(num_iter=10, num_sampling_steps=3), **options)
    off = replace(sampling, num_sampling_steps_last=None, guidance_interval=(0.0, 1.0), uncond_refresh=1)
    estimated = rollout_flops(CONFIG, sampling, NUM_TEXT)
    assert estimated == counted_per_image(CONFIG, sampling)
    assert estimated < rollout_flops(CONFIG, off, NUM_TEXT)


def test_annealed_steps_are_fewer_head_calls():
    sampling = SamplingConfig(num_iter=4, num_sampling_steps=8, num_sampling_steps_last=2)
    cost = estimate_cost(CONFIG, sampling, 2, 3, "elbo", 3, 6, 2, True, NUM_TEXT, updates=10)
    assert cost.head_calls == 8 + 6 + 4 + 2


def test_an_elbo_update_adds_up():
    """The mean over the iterations that a mask may belong to, weighted with the tokens that each unmasks."""
    cost = estimate_cost(CONFIG, SAMPLING, 2, 3, "elbo", 3, 6, 2, True, NUM_TEXT, updates=10)
    counts = cosine_masked_counts(CONFIG.num_tokens, 3)
    mean = backward = 0.0
    for now, after in pairwise(counts):
        forward, gradients = counted_scoring(CONFIG, 1, now, now, 6)
        mean += forward * (now - after) / 16
        backward += gradients * (now - after) / 16
    assert cost.scoring_flops == pytest.approx(6 * 3 * (4 * mean + 2 * backward))  # old, reference, two inner epochs
    assert cost.rollout_flops == 6 * rollout_flops(CONFIG, SAMPLING, NUM_TEXT)
    assert cost.total_flops == pytest.approx(10 * (cost.rollout_flops + cost.scoring_flops))
    assert (cost.images, cost.iterations, cost.head_calls) == (6, 3, 18)
    assert (cost.rollout_passes, cost.scoring_passes) == (3, 12)


def test_a_trajectory_update_scores_the_tokens_of_an_iteration_and_its_other_branches_forward_only():
    arguments = (2, 3, "trajectory", 4, None, 1, False, NUM_TEXT, 1)
    one = replace(SAMPLING, num_iter=16)  # every iteration unmasks one token
    forward = backward = 0.0
    for m in range(1, 17):
        part = scoring_flops(CONFIG, m, 6 - 4, NUM_TEXT)  # six steps, two at either end skipped
        forward, backward = forward + part.forward / 16, backward + part.gradients(False) / 16
    plain = estimate_cost(CONFIG, one, *arguments)
    guided = estimate_cost(CONFIG, replace(one, cfg_text=3.0, cfg_layout=3.0), *arguments)
    assert plain.scoring_flops == pytest.approx(6 * 4 * (2 * forward + backward))  # old and one inner epoch
    assert guided.scoring_flops == pytest.approx(6 * 4 * (4 * forward + backward))


def test_accumulated_batches_follow_one_another():
    """Twice the prompts at once, or in two batches: the same images and FLOPs, but twice the calls."""
    at_once = estimate_cost(CONFIG, SAMPLING, 4, 3, "elbo", 3, 6, 2, True, NUM_TEXT, updates=10)
    in_turn = estimate_cost(CONFIG, SAMPLING, 2, 3, "elbo", 3, 6, 2, True, NUM_TEXT, updates=10, accum_iter=2)
    assert (in_turn.images, in_turn.update_flops) == (at_once.images, at_once.update_flops)
    assert in_turn.head_calls == 2 * at_once.head_calls
    assert in_turn.rollout_passes == 2 * at_once.rollout_passes
    assert in_turn.scoring_passes == 2 * at_once.scoring_passes


def test_the_reference_and_each_inner_epoch_cost_what_they_do():
    def cost(inner_epochs: int, has_reference: bool) -> float:
        return estimate_cost(
            CONFIG, SAMPLING, 1, 2, "elbo", 2, 4, inner_epochs, has_reference, NUM_TEXT, 1
        ).scoring_flops

    forward = cost(1, True) - cost(1, False)
    assert cost(3, False) - cost(2, False) == pytest.approx(cost(2, False) - cost(1, False))
    assert 2.7 * forward < cost(2, False) - cost(1, False) < 3 * forward


def test_the_huge_model_on_the_papers_command():
    """16 images, 256 iterations of 100 steps: 130 + 8 TFLOP an image by an independent count of the whole backbone, of
    which the sampler computes caption keys and values once (3.4 % of it) and the last block where needed (2.5 %)."""
    cost = estimate_cost(HUGE, SamplingConfig(256, 100), 4, 4, "elbo", 4, 8, 1, True, 77, updates=206_950)
    assert cost.rollout_flops / 16 == pytest.approx(137.7e12 * (1 - 0.034 - 0.025), rel=0.02)
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
        ({"estimator": "exact"}, "rl_estimator .* 'exact'"),
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
