"""Guidance distillation: the mixture, its scales by state, the loss, and a student that becomes its guided teacher."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.train.optim import build_optimizer
from models.distillation import Distilled, GuidedTeacher, scales_at
from models.sampling.config import SamplingConfig, default_sampling, guidance_scales
from models.sampling.guidance import combine_branches
from models.structmar import StructMAR, TrainingNoise
from tests.helpers.rl_world import as_codes, code_variant, frozen_copy, variant
from tests.helpers.training import tiny_inputs

GUIDED = SamplingConfig(num_iter=4, cfg_text=6.0, cfg_layout=4.0, cfg_schedule="constant")
CODES = default_sampling("discrete", num_iter=4, cfg_text=3.0, cfg_layout=2.0, cfg_schedule="constant")
HEADS = {"diffusion": (variant, GUIDED), "discrete": (code_variant, CODES)}


def given(model: StructMAR, seed: int, count: int = 3, ratio_min: float = 0.1) -> dict[str, Any]:
    """The arguments of `forward`."""
    inputs = tiny_inputs(count, seed)
    inputs = as_codes(inputs) if model.config.head == "discrete" else inputs
    noise = model.sample_training_noise(count, torch.Generator().manual_seed(seed), ratio_min)
    return {"latents": inputs.latents, "noise": noise, "text": inputs.text, "layout": inputs.layout}


def branch(model: StructMAR, name: str, latents: Tensor, noise: TrainingNoise, text: Any, layout: Any) -> Tensor:
    of = {"full": (text, layout), "text": (text, None), "null": (None, None)}[name]
    return model.predictions(latents, noise, None, *of)


@pytest.mark.parametrize("head", HEADS)
def test_without_guidance_equal_weights_have_no_loss_at_all(head: str) -> None:
    build, config = HEADS[head]
    model = build()
    student = Distilled(model, GuidedTeacher(frozen_copy(model), config.unguided()))
    assert student(**given(model, 1)).item() == 0


def test_in_bf16_equal_weights_have_no_loss_either() -> None:
    model = variant()
    teachers = {False: GuidedTeacher(frozen_copy(model), GUIDED.unguided()), True: GuidedTeacher(model, GUIDED)}
    exact = Distilled(model, teachers[True])(**given(model, 1)).item()
    with torch.autocast("cpu", torch.bfloat16):
        assert Distilled(model, teachers[False])(**given(model, 1)).item() == 0
        assert Distilled(model, teachers[True])(**given(model, 1)).item() == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("head", HEADS)
def test_the_teacher_says_what_the_sampler_goes_by(head: str) -> None:
    """eps, or logits, by hand; the variance fraction is the full branch's."""
    build, config = HEADS[head]
    model, inputs = build(), given(build(), 2)
    wanted = GuidedTeacher(model, config).predictions(**inputs)
    full, text, null = (branch(model, name, **inputs) for name in ("full", "text", "null"))
    mixed = null + config.cfg_text * (text - null) + config.cfg_layout * (full - text)
    if head == "diffusion":
        channels = mixed.shape[-1] // 2
        mixed = torch.cat([mixed[:, :channels], full[:, channels:]], dim=-1)
    torch.testing.assert_close(wanted, mixed, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("scales", [(6.0, 4.0), (1.0, 4.0), (3.0, 3.0), (1.0, 1.0), (0.0, 2.0)])
@pytest.mark.parametrize("as_rows", [False, True])
def test_mixture(scales: tuple[float, float], as_rows: bool) -> None:
    """The coefficients of the branches sum to 1, and a change of the full branch arrives w_layout times."""
    w_text, w_layout = (torch.full((5, 1), scale, dtype=torch.float64) if as_rows else scale for scale in scales)
    eps = {name: torch.full((5, 2), 0.7, dtype=torch.float64, requires_grad=True) for name in ("full", "text", "null")}
    mixed = combine_branches(eps, w_text, w_layout)
    torch.testing.assert_close(mixed, torch.full_like(mixed, 0.7))
    mixed.sum().backward()
    coefficients = {name: each.grad for name, each in eps.items() if each.grad is not None}
    expected = {"full": scales[1], "text": scales[0] - scales[1], "null": 1 - scales[0]}
    for name, value in expected.items():
        torch.testing.assert_close(coefficients[name], torch.full_like(coefficients[name], value))


@pytest.mark.parametrize("schedule", ["linear", "constant", "step_linear"])
def test_every_state_has_the_scale_of_the_iteration_that_it_occurs_in(schedule: str) -> None:
    config = replace(GUIDED, cfg_schedule=schedule, guidance_interval=(0.3, 1.0))
    counts = config.masked_counts(16)
    for iteration, (now, after) in enumerate(pairwise(counts)):
        expected = guidance_scales(config, 16, after, iteration) if iteration >= 2 else (1.0, 1.0)
        assert all(scales_at(config, 16, count) == expected for count in range(after + 1, now + 1))


def test_images_that_hide_different_numbers_of_tokens_have_scales_of_their_own() -> None:
    """A batch of a trunk that sees all tokens is its images, one by one."""
    model = code_variant(trunk="single", encoder_depth=0)
    config = replace(CODES, cfg_schedule="linear")
    inputs = given(model, 4, count=3)
    mask = inputs["noise"].mask
    assert mask.counts is not None
    assert len(set(mask.counts)) > 1
    together = GuidedTeacher(model, config).predictions(**inputs)
    ends = torch.tensor(mask.counts).cumsum(0).tolist()
    full, text, null = (branch(model, name, **inputs) for name in ("full", "text", "null"))
    for count, end in zip(mask.counts, ends, strict=True):
        rows = slice(end - count, end)
        w_text, w_layout = scales_at(config, 16, count)
        alone = null[rows] + w_text * (text[rows] - null[rows]) + w_layout * (full[rows] - text[rows])
        torch.testing.assert_close(together[rows], alone, atol=2e-5, rtol=1e-4)


def test_the_loss_of_the_head_by_hand() -> None:
    model = variant(diffusion_batch_mul=2)
    inputs = given(model, 5)
    noise = inputs["noise"].head
    teacher = GuidedTeacher(model, GUIDED)
    wanted, found = (
        teacher.predictions(**inputs),
        model.predictions(*list(inputs.values())[:2], None, *list(inputs.values())[2:]),
    )
    tables = model.diffloss.tables_at(noise.timesteps)
    bar = tables["sqrt_alphas_cumprod"].square()
    weight = ((1 - bar) / bar).clip(1.0, 100)
    channels = found.shape[-1] // 2
    squares = (found - wanted).square()
    by_hand = (weight * squares[:, :channels] + 0.05 * squares[:, channels:]).sum(-1) / channels
    torch.testing.assert_close(Distilled(model, teacher)(**inputs), by_hand.mean())
    assert len(found) == 2 * inputs["noise"].mask.num_hidden


def test_only_the_student_learns() -> None:
    model = variant()
    teacher = frozen_copy(model)
    student = Distilled(model, GuidedTeacher(teacher, GUIDED))
    student(**given(model, 6)).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(name.startswith("teacher") for name, _ in student.named_parameters())
    missed = [name for name, each in model.named_parameters() if each.requires_grad and each.grad is None]
    assert not missed


@pytest.mark.parametrize("head", HEADS)
def test_a_fitted_student_is_the_guided_mixture_in_states_that_it_has_not_seen(head: str) -> None:
    """The masks and noises that count are none of those that it was trained on."""
    build, config = HEADS[head]
    model = build()
    teacher = GuidedTeacher(frozen_copy(model), replace(config, cfg_text=4.0, cfg_layout=3.0))
    student = Distilled(model, teacher)
    inputs = given(model, 1, count=4)

    def loss(seed: int) -> Tensor:
        noise = model.sample_training_noise(4, torch.Generator().manual_seed(seed), 0.1)
        return student(**inputs | {"noise": noise})

    def unseen() -> float:
        with torch.no_grad():
            return float(torch.stack([loss(seed) for seed in range(4)]).mean())

    before = unseen()
    trainable = {name: each for name, each in model.named_parameters() if each.requires_grad}
    optimizer = build_optimizer(trainable, 5e-4, 0.0)
    for step in range(60):
        optimizer.zero_grad()
        loss(1000 + step).backward()
        optimizer.step()
    assert unseen() < 0.2 * before
