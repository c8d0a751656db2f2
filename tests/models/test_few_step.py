"""The few-step head: its distance, its levels, that training and sampling mean the same, and that it learns to draw."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.train.parallel import wrap
from models.config import MAX_HEAD_EVALS, StructMARConfig
from models.few_step import (
    TRAINED_EVALS,
    FewStepDistilled,
    FewStepNoise,
    FewStepSettings,
    draw_noise,
    energy_distance,
    require_fitting_teacher,
)
from models.heads.few_step import FIRST_TIMESTEP, FewOptions, levels
from models.inference import inference_copy
from models.sampling.config import SamplingConfig
from models.sampling.few import few_sampling
from models.sampling.sampler import sample
from models.structmar import StructMAR
from models.weights import is_trainable, select_trainable, with_few_step
from tests.helpers.processes import assert_close, in_two_processes
from tests.helpers.structured import generator
from tests.helpers.training import CONFIG, gradients, rows_of, tiny_inputs, tiny_model

FEW_CONFIG = replace(CONFIG, few_step_head=True)
TEACHER = SamplingConfig(num_iter=4, num_sampling_steps=6, t_max=950, clip_x0=3.0, cfg_text=2.0, cfg_layout=1.5)
SETTINGS = FewStepSettings(tokens=5, draws=3)


def few_model() -> StructMAR:
    """A tiny model with every part in play, whose few-step head begins as its diffusion network."""
    model = StructMAR(FEW_CONFIG).eval()
    model.load_state_dict(with_few_step(tiny_model().state_dict()))
    select_trainable(model, "few_step")
    return model


def some_noise(model: StructMAR, seed: int = 0, settings: FewStepSettings = SETTINGS) -> FewStepNoise:
    return draw_noise(model, TEACHER, settings, 4, generator(seed), 0.3, model.config.grid)


# --- the distance ----------------------------------------------------------------------------------------------------


def test_the_distance_by_hand() -> None:
    """Draws 0, 2 and 1, 5 of one number: 2 * (1 + 5 + 1 + 3) / 4 - 2 - 4 = -1. Of two tokens, the mean."""
    x, y = torch.tensor([[[0.0]], [[2.0]]]), torch.tensor([[[1.0]], [[5.0]]])
    torch.testing.assert_close(energy_distance(x, y), torch.tensor(-1.0), rtol=0, atol=1e-5)
    apart = torch.tensor([[[9.0]], [[9.0]]])  # to 0, 2: 2 * (9 + 7) / 2 - 2 - 0 = 14
    both = energy_distance(torch.cat([x, x], 1), torch.cat([y, apart], 1))
    torch.testing.assert_close(both, torch.tensor(6.5), rtol=0, atol=1e-5)


def test_the_distance_is_least_where_the_draws_are_alike() -> None:
    """Without bias: about 0 for equal distributions, and what another mean or deviation gives is larger."""
    draws = generator()
    y = torch.randn(2, 20000, 3, generator=draws)
    found = {}
    for mean, std in ((0.0, 1.0), (0.3, 1.0), (0.0, 0.6), (0.0, 1.5)):
        found[mean, std] = float(energy_distance(mean + std * torch.randn(2, 20000, 3, generator=draws), y))
    assert abs(found[0.0, 1.0]) < 0.02
    assert all(found[other] > 0.05 for other in found if other != (0.0, 1.0))


def test_equal_draws_have_a_gradient() -> None:
    x = torch.zeros(2, 3, 4, requires_grad=True)
    energy_distance(x, torch.zeros(2, 3, 4)).backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())


# --- the head --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_evals", range(1, MAX_HEAD_EVALS + 1))
def test_levels_fall_from_the_first(num_evals: int) -> None:
    steps = levels(num_evals)
    assert len(steps) == num_evals and steps[0].timestep == FIRST_TIMESTEP
    assert [step.timestep for step in steps] == sorted({step.timestep for step in steps}, reverse=True)
    assert all(step.signal**2 + step.noise**2 == pytest.approx(1.0) for step in steps)
    assert FewOptions(num_evals).num_calls == num_evals


@pytest.mark.parametrize("num_evals", [1, 2, 4])
@torch.no_grad()
def test_what_is_trained_is_what_is_sampled(num_evals: int) -> None:
    model = few_model()
    z, noise = torch.randn(5, 32, generator=generator(1)), torch.randn(num_evals, 15, 4, generator=generator(2))
    trained = FewStepDistilled(model, TEACHER, SETTINGS).student_draws(z, noise)[-1].flatten(0, 1)
    step = model.head.sampler(model.head, None).at(FewOptions(num_evals))
    sampled = step.sample(z.repeat(3, 1)[None], lambda eps: eps[0], noise).tokens
    torch.testing.assert_close(sampled, trained, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_temperature_and_bound() -> None:
    model, z = few_model(), torch.randn(1, 6, 32, generator=generator(1))
    head = model.head.sampler(model.head, None)

    def drawn(options: FewOptions, seed: int) -> Tensor:
        step = head.at(options)
        return step.sample(z, lambda eps: eps[0], step.draw_noise([generator(seed)], 6)[:, 0]).tokens

    assert torch.equal(drawn(FewOptions(2, temperature=0.0), 1), drawn(FewOptions(2, temperature=0.0), 2))
    assert not torch.equal(drawn(FewOptions(2), 1), drawn(FewOptions(2), 2))
    assert drawn(FewOptions(2, clip_x0=0.1), 1).abs().max() <= 0.1


def images(model: StructMAR, config: SamplingConfig, seeds: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    inputs = tiny_inputs(2)
    rows = [seed % 2 for seed in seeds]
    chosen = rows_of(inputs, rows)
    return sample(model, config, [generator(seed) for seed in seeds], chosen.text, chosen.layout, dtype=dtype).tokens


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch_nor_much_on_bf16() -> None:
    model, config = few_model(), few_sampling(TEACHER, 2)
    both = images(model, config, (2, 3), torch.float32)
    torch.testing.assert_close(both[1:], images(model, config, (3,), torch.float32), rtol=1e-4, atol=1e-4)
    rounded = images(model, config, (2, 3), torch.bfloat16)
    assert 0 < (rounded - both).square().mean() < 0.05 * both.square().mean()


def test_the_copy_for_sampling_casts_both_networks() -> None:
    copy = inference_copy(few_model(), torch.bfloat16)
    for net in copy.diffloss.networks():
        assert net.res_blocks[0].mlp[0].weight.dtype == torch.bfloat16 and net.cond_embed.weight.dtype == torch.float32
    assert len(copy.diffloss.networks()) == 2


# --- training --------------------------------------------------------------------------------------------------------


def test_the_few_step_head_alone_trains_and_in_no_other_mode() -> None:
    names = [name for name, _ in StructMAR(FEW_CONFIG).named_parameters()]
    few = {name for name in names if name.startswith("diffloss.few.")}
    assert few and {name for name in names if is_trainable(name, "few_step")} == few
    for mode in ("full", "text_layout", "text_proj", "backbone", "class"):
        assert not any(is_trainable(name, mode) for name in few)


def test_a_head_begins_as_the_diffusion_network_or_as_it_was() -> None:
    plain = tiny_model().state_dict()
    begun = with_few_step(plain)
    assert torch.equal(begun["diffloss.few.input_proj.weight"], plain["diffloss.net.input_proj.weight"])
    other = begun | {"diffloss.few.input_proj.weight": torch.ones(32, 4)}
    assert torch.equal(with_few_step(other)["diffloss.few.input_proj.weight"], torch.ones(32, 4))


def test_the_teacher_is_the_sampler() -> None:
    """Its draws are those of `HeadStep.sample` at the scales of the iteration that a state belongs to."""
    model, noise, inputs = few_model(), some_noise(few_model()), tiny_inputs(4)
    distilled = FewStepDistilled(model, replace(TEACHER, cfg_schedule="constant"), SETTINGS)
    z = torch.randn(3, len(noise.rows), 32, generator=generator(3))
    drawn = distilled.teacher_draws(("full", "text", "null"), distilled.sampling, z, noise)
    step = model.head.sampler(model.head, None).at(TEACHER.head_options(0))

    def guide(eps: Tensor) -> Tensor:
        return eps[2] + 2.0 * (eps[1] - eps[2]) + 1.5 * (eps[0] - eps[1])

    expected = step.sample(z.repeat(1, 3, 1), guide, noise.teacher).tokens
    torch.testing.assert_close(drawn.flatten(0, 1), expected, rtol=1e-3, atol=1e-4)
    assert inputs.text is not None


def test_only_hidden_tokens_are_drawn_and_each_once() -> None:
    model = few_model()
    for seed in range(20):
        noise = some_noise(model, seed)
        assert bool(noise.mask.masked.flatten()[noise.rows].all())
        assert len(set(noise.rows.tolist())) == len(noise.rows) == 4 * min(5, noise.mask.num_masked)
    assert {len(some_noise(model, seed).student) for seed in range(100)} == set(TRAINED_EVALS)


def test_a_step_moves_the_head_alone() -> None:
    model, inputs, noise = few_model(), tiny_inputs(4), some_noise(few_model())
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    loss = FewStepDistilled(model, TEACHER, SETTINGS)(inputs.latents, noise, text=inputs.text, layout=inputs.layout)
    loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name in before if name.startswith("diffloss.few.")}


def few_gradients(model: StructMAR, noises: list[FewStepNoise], rank: int | None = None) -> dict[str, Tensor]:
    """Of the mean over the noises, or what two processes make of it, each with the noise of its rank."""
    wrapped = wrap(FewStepDistilled(model, TEACHER, SETTINGS), torch.device("cpu"), 1 if rank is None else 2)
    chosen = noises if rank is None else [noises[rank]]
    for noise in chosen:
        inputs = tiny_inputs(4)
        (wrapped(inputs.latents, noise, text=inputs.text, layout=inputs.layout) / len(chosen)).backward()
    return gradients(model)


def test_two_processes_are_one() -> None:
    noises = [some_noise(few_model(), seed) for seed in (1, 2)]
    expected = few_gradients(few_model(), noises)
    for found in in_two_processes(lambda rank: few_gradients(few_model(), noises, rank)):
        assert_close(found, expected)


def test_it_learns_to_draw_what_the_guided_sampler_draws() -> None:
    """On conditions that it did not see, with one evaluation as with four."""
    model, settings = few_model(), FewStepSettings(tokens=16, draws=8)
    distilled, inputs, unseen = FewStepDistilled(model, TEACHER, SETTINGS), tiny_inputs(4), tiny_inputs(4, seed=9)
    held_out = FewStepDistilled(model, TEACHER, settings)

    @torch.no_grad()
    def distance(num_evals: int) -> float:
        noise = draw_noise(model, TEACHER, settings, 4, generator(77), 0.3, model.config.grid)
        shape = (num_evals, *noise.student.shape[1:])
        noise = replace(noise, student=torch.randn(shape, generator=generator(78)))
        return float(held_out(unseen.latents, noise, text=unseen.text, layout=unseen.layout))

    before = distance(1), distance(4)
    assert model.diffloss.few is not None
    optimizer = torch.optim.Adam(model.diffloss.few.parameters(), lr=3e-3)
    for step in range(60):
        loss = distilled(inputs.latents, some_noise(model, step), text=inputs.text, layout=inputs.layout)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert distance(1) < 0.3 * before[0] and distance(4) < 0.3 * before[1]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_evals": 9}, "head_evals must lie between 1 and 8, got 9"),
        ({"head_evals": 0}, "head_evals must lie between 1 and 8, got 0"),
        ({"head_evals": 2, "cfg_text": 3.0}, "cfg_text 3 does not go with head_evals 2"),
        ({"head_evals": 2, "cfg_layout": 4.0}, "cfg_layout 4 does not go with head_evals 2"),
        ({"head_evals": 2, "head": "discrete"}, "head_evals is an option of the diffusion head"),
    ],
)
def test_options_that_a_few_step_head_cannot_have(options, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**options)


def test_weights_without_the_head_refuse_its_options() -> None:
    with pytest.raises(ValueError, match="head_evals 2 needs a few-step head, and the model has none"):
        sample(tiny_model().eval(), SamplingConfig(head_evals=2), [generator()])


def test_codes_have_no_few_step_head() -> None:
    with pytest.raises(ValueError, match="few_step_head with head 'discrete'"):
        StructMARConfig(head="discrete", codebook_size=8, vae_embed_dim=1, few_step_head=True)


def test_reverse_processes_are_not_recorded_without_reverse_steps() -> None:
    with pytest.raises(ValueError, match=r"\(the trajectory estimator\) need reverse steps.*head_evals 2: take elbo"):
        replace(few_sampling(TEACHER, 2)).require_traceable()


@pytest.mark.parametrize("options", [{"prefix_k": 3}, {"num_sampling_steps_last": 3}, {"layout_scale": 0.5}])
def test_teachers_that_draw_tokens_unlike_one_another(options) -> None:  # type: ignore[no-untyped-def]
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"{name} {value} does not go with few-step distillation"):
        require_fitting_teacher(replace(TEACHER, **options))
