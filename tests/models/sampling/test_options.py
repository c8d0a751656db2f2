"""The options that spend less: what each makes of an iteration, and that none does anything when it is off."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import scripts.evaluate_layout
import scripts.sample
from engine.cli.sampling import parse_sampling_args, sampling_config
from engine.cli.speed import SPEEDS
from engine.sample.step_comparison import channel_changes, compare_steps, energy_distance, head_inputs
from models.heads.diffusion import reverse_steps
from models.heads.diffusion_sampler import ReverseOptions
from models.masking import cosine_masked_counts, sample_orders
from models.policy.trajectory import TrajectoryEstimator
from models.sampling.condition_cache import GuidedBackbone, plan_iterations
from models.sampling.config import SamplingConfig
from models.sampling.guidance import embed_branches
from models.sampling.orders import PLANNED, PlannedOrder, draw_orders, halton_cells
from models.sampling.sampler import sample
from models.structmar import StructMAR
from tests.conftest import ROOT
from tests.helpers import reference
from tests.helpers.sampled import conditions, sampled, world
from tests.helpers.sampling import run_unmask
from tests.helpers.structured import generator

FULL, RUN, REUSE = "full only", "run", "reuse"
QUICK = SamplingConfig(num_iter=10, num_sampling_steps=4, t_max=950, cfg_text=1.5, cfg_layout=3.0)


def test_steps_shrink_linearly() -> None:
    config = SamplingConfig(num_iter=10, num_sampling_steps=50, num_sampling_steps_last=5)
    options = [config.head_options(iteration) for iteration in range(10)]
    assert options == [ReverseOptions(steps, 950) for steps in (50, 45, 40, 35, 30, 25, 20, 15, 10, 5)]
    assert replace(config, t_max=999).head_options(9) == ReverseOptions(5, 999)
    assert replace(config, num_iter=1).head_options(0) == ReverseOptions(50, 950)
    assert SamplingConfig(temperature=0.5, clip_x0=3.0).head_options(63) == ReverseOptions(100, None, 0.5, 3.0)


def test_annealed_steps_are_the_plain_samplers() -> None:
    model = world("mini")
    config = replace(QUICK, num_iter=4, num_sampling_steps=9, num_sampling_steps_last=3, t_max=None)
    expected, found = (sampled(model, config, *conditions(model), plain=plain)[0] for plain in (True, False))
    assert reference.relative_error(found, expected) < 1e-5
    same = replace(config, num_sampling_steps_last=9)
    constant = sampled(model, replace(QUICK, num_iter=4, num_sampling_steps=9), *conditions(model))[0]
    assert torch.equal(sampled(model, same, *conditions(model))[0], constant)
    assert reference.relative_error(found, constant) > 1e-2


def test_an_iteration_draws_noise_for_its_own_steps() -> None:
    model, calls = world("tiny"), []
    config = SamplingConfig(num_iter=4, num_sampling_steps=12, num_sampling_steps_last=3)

    def noise(iteration: int, num_draws: int, num_tokens: int) -> Tensor:
        calls.append(num_draws)
        return torch.randn(num_draws, 1, num_tokens, 16, generator=generator(iteration))

    with torch.no_grad():
        branches, config = embed_branches(model, config, 1, None, None, None)
        run_unmask(model, branches, sample_orders(1, 64, [generator()]), noise, config)
    assert calls == [len(reverse_steps(steps, 950)) + 1 for steps in (12, 9, 6, 3)]


@pytest.mark.parametrize(
    ("options", "uses"),
    [
        ({}, [RUN] * 10),
        ({"guidance_interval": (0.2, 0.7)}, [FULL] * 2 + [RUN] * 5 + [FULL] * 3),
        ({"guidance_interval": (0.25, 1.0)}, [FULL] * 3 + [RUN] * 7),
        ({"uncond_refresh": 3}, [RUN] * 5 + [REUSE, REUSE, RUN, REUSE, REUSE]),
        ({"uncond_refresh": 2, "guidance_interval": (0.1, 0.9)}, [FULL] + [RUN] * 5 + [REUSE, RUN, REUSE, FULL]),
    ],
    ids=str,
)
def test_what_becomes_of_the_branches(options: dict[str, Any], uses: list[str]) -> None:
    config = replace(QUICK, **options)
    assert config.branch_uses(3) == uses
    assert config.branch_uses(1) == [RUN] * 10  # there are no other branches


def test_guidance_only_in_its_interval() -> None:
    """Until it begins, the tokens are the unguided ones; from then on they are not."""
    model = world("mini")
    late = sampled(model, replace(QUICK, guidance_interval=(0.5, 1.0)), *conditions(model))[0]
    unguided = sampled(model, replace(QUICK, cfg_text=1.0, cfg_layout=1.0), *conditions(model))[0]
    hidden = sample_orders(2, 64, [generator(7)])[0, : cosine_masked_counts(64, 10)[5]]
    before = torch.ones(64, dtype=torch.bool).scatter(0, hidden, False)
    torch.testing.assert_close(late[0, before], unguided[0, before], rtol=1e-4, atol=1e-4)
    assert reference.relative_error(late[0, ~before], unguided[0, ~before]) > 1e-2


def test_condition_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """In between runs the full branch alone runs, and the others keep their difference to it."""
    model = world("mini")
    rows: list[int] = []
    original = StructMAR.predict

    def counting(self: StructMAR, tokens: Tensor, *args: Any) -> Tensor:
        rows.append(len(tokens))
        return original(self, tokens, *args)

    monkeypatch.setattr(StructMAR, "predict", counting)
    order = PlannedOrder(sample_orders(2, 64, [generator(3)]), cosine_masked_counts(64, 10))
    plans = plan_iterations(order, replace(QUICK, uncond_refresh=3).branch_uses(3))
    tokens = torch.randn(2, 64, model.config.token_dim, generator=generator(4))
    with torch.no_grad():
        branches, _ = embed_branches(model, QUICK, 2, *conditions(model), None)
        every = model.prepare(branches.conditions, torch.float32)
        backbone = GuidedBackbone(3)
        found = [backbone(every, tokens, plan) for plan in plans]
        assert rows == [6] * 5 + [2, 2, 6, 2, 2]

        def direct(kept: Tensor, ids: Tensor) -> Tensor:
            parts = (tokens.repeat(3, 1, 1), kept.repeat(3, 1), ids.repeat(3, 1))
            return model.predict(parts[0], parts[1], every, parts[2]).unflatten(0, (3, 2))

        for iteration, (plan, z) in enumerate(zip(plans, found, strict=True)):
            now = direct(plan.kept_ids, plan.token_ids)
            ran = plans[7 if iteration > 7 else 4]
            then = now if plan.use == RUN else direct(ran.kept_ids, plan.token_ids)
            expected = now[:1] + then - then[:1]
            assert reference.relative_error(z, expected) < 1e-5
            if plan.use == REUSE:
                assert reference.relative_error(now, expected) > 1e-3


@pytest.mark.parametrize("options", [{"uncond_refresh": 4}, {"guidance_interval": (0.4, 0.6)}], ids=str)
def test_without_guidance_there_is_nothing_to_leave_out(options: dict[str, Any]) -> None:
    model = world("mini")
    config = replace(QUICK, cfg_text=1.0, cfg_layout=1.0)
    expected = sampled(model, config, *conditions(model))[0]
    assert torch.equal(sampled(model, replace(config, **options), *conditions(model))[0], expected)


def test_the_condition_cache_stays_near() -> None:
    model = world("mini")
    expected = sampled(model, QUICK, *conditions(model))[0]
    found = sampled(model, replace(QUICK, uncond_refresh=3), *conditions(model))[0]
    assert 0 < float((found - expected).square().mean() / expected.square().mean()) < 0.02


@pytest.mark.parametrize("kind", PLANNED)
def test_orders(kind: str) -> None:
    generators = [generator(1), generator(2)]
    orders = draw_orders(kind, 2, (4, 6), generators)
    assert orders.dtype == torch.int64 and orders.sort(dim=1).values.tolist() == [list(range(24))] * 2
    assert (orders[0].tolist() == orders[1].tolist()) == (kind in ("raster", "halton_fixed"))
    assert torch.equal(draw_orders(kind, 1, (4, 6), [generator(2)])[0], orders[1])
    if kind == "random":
        assert torch.equal(orders, sample_orders(2, 24, [generator(1), generator(2)]))
    if kind == "gtr":
        colours = (orders // 6 + orders % 6) % 2
        assert colours.tolist() == [[0] * 12 + [1] * 12] * 2  # unmasked from the end


def test_halton_spreads_the_first_tokens() -> None:
    cells = halton_cells(8, 8)
    assert cells[:5] == [(0, 0), (4, 2), (2, 5), (6, 0), (1, 3)]
    quadrants = [(row // 4, column // 4) for row, column in cells[:16]]
    assert all(3 <= quadrants.count(each) <= 5 for each in set(quadrants)) and len(set(quadrants)) == 4


def test_an_order_is_used() -> None:
    model = world("tiny")
    config = SamplingConfig(num_iter=2, num_sampling_steps=2, t_max=950, order="gtr")
    orders = sample(model, config, [generator(1)]).orders
    assert ((orders // 8 + orders % 8) % 2).tolist() == [[0] * 32 + [1] * 32]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_sampling_steps_last": 2}, "num_sampling_steps 4, num_sampling_steps_last 2"),
    ({"uncond_refresh": 2}, "uncond_refresh 2"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_be_scored_is_not_recorded(options: dict[str, Any], message: str) -> None:
    config = replace(QUICK, **options)
    calls: list[Callable[[], object]] = [
        lambda: sample(world("tiny"), config, [generator()], record=True),
        lambda: TrajectoryEstimator(config, num_masks=2),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"trajectory estimator.*{message}"):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "spiral"}, "order must be one of .* got 'spiral'"),
        ({"guidance_interval": (0.5, 0.5)}, "guidance_interval .* got 0.5 and 0.5"),
        ({"guidance_interval": (-0.1, 1.0)}, "guidance_interval .* got -0.1 and 1.0"),
        ({"uncond_refresh": 0}, "uncond_refresh must be at least 1, got 0"),
        ({"num_sampling_steps_last": 0}, "num_sampling_steps_last must lie between 1 and 1000, got 0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**options)


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("program", [scripts.sample, scripts.evaluate_layout], ids=["sample", "evaluate"])
def test_speeds(program: Any, speed: str) -> None:
    """A preset changes sampling and precision alone, never slows down, and yields to flags."""

    def parsed(*argv: str) -> dict[str, Any]:
        name = "mini_sample" if program is scripts.sample else "mini_eval"
        words = ["--config", str(ROOT / "configs" / f"{name}.yaml"), *argv]
        return vars(parse_sampling_args(program.get_parser(), words)[0])

    plain, found = parsed(), parsed("--speed", speed)
    changed = {key for key in found if found[key] != plain[key]} - {"speed"}
    assert changed <= SPEEDS[speed].keys() and bool(changed) == (speed != "exact")
    assert found["num_iter"] <= plain["num_iter"] and found["num_sampling_steps"] == 25  # the weights', below 50
    said = parsed("--speed", speed, "--num_iter", "60", "--precision", "fp32", "--num_sampling_steps", "70")
    assert (said["num_iter"], said["precision"], said["num_sampling_steps"]) == (60, "fp32", 70)
    sampling_config(argparse.Namespace(**found))


def test_energy_distance() -> None:
    """By hand in one dimension: samples 0, 2 and 1, 5: 2 * (1 + 5 + 1 + 3) / 4 - 2 / 2 - 4 / 2 = 2."""
    x, y = torch.tensor([[[0.0], [2.0]]]), torch.tensor([[[1.0], [5.0]]])
    torch.testing.assert_close(energy_distance(x, y), torch.tensor([2.0]))
    torch.testing.assert_close(energy_distance(x, x), torch.tensor([0.0]))
    shift, change = channel_changes(y, x)  # 3 - 1 in deviations of sqrt(2); sqrt(8) against sqrt(2)
    assert (shift, change) == (pytest.approx(2**0.5), pytest.approx(1.0))


def test_a_comparison_notices_too_few_steps() -> None:
    model = world("mini")
    config = SamplingConfig(num_iter=8, num_sampling_steps=10, cfg_text=2.0, cfg_layout=2.0, clip_x0=5.0)
    inputs = head_inputs(model, config, *conditions(model), iterations=[1, 5])
    counts = cosine_masked_counts(64, 8)
    assert [given.z.shape[:2] for given in inputs] == [(2, 2 * (counts[i] - counts[i + 1])) for i in (1, 5)]
    tried = [replace(config, num_sampling_steps=steps) for steps in (40, 2)]
    many, few = compare_steps(model, config, inputs, tried, num_draws=6, full_steps=40)
    assert (many.calls, few.calls) == (8 * 40, 8 * 2)
    assert many.floor_energy == few.floor_energy > 0 and many.energy < 1.3 * many.floor_energy
    assert few.energy > 2 * few.floor_energy and not few.is_accepted
