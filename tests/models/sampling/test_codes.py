"""Drawing codes: one uniform number each, filtered and guided logits, the surest first; laws of the whole sampler."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, cast

import diffusers.schedulers.scheduling_amused as amused
import pytest
import torch
from torch import Tensor

import models.heads.discrete_sampler
from models.heads.discrete_sampler import CodeOptions, CodeSampler, CodeStep, CodeTrace, draw_codes, filter_logits
from models.sampling.config import ORDERS, SCHEDULES, SamplingConfig, default_sampling, guidance
from models.sampling.sampler import KnownTokens, SampleOutput, sample
from models.structmar import StructMAR
from tests.helpers.plain_maskgil import MASK, NUM_CODES, PlainHead, PlainMaskGIL
from tests.helpers.structured import generator

PLAIN = CodeOptions()


def drawn(config: SamplingConfig, seeds: list[int], side: int = 4, **options: Any) -> SampleOutput:
    model = cast(StructMAR, PlainMaskGIL(side))
    return sample(model, config, [generator(seed) for seed in seeds], **options)


def some_logits(*shape: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=generator(4))


def test_a_code_is_the_inverse_of_the_cumulative_sum() -> None:
    """By hand: shares 1/4, 0, 1/2, 1/4; a boundary belongs to the code above it."""
    logits = torch.tensor([0.25, 0.0, 0.5, 0.25]).log().expand(6, 1, 4)
    uniforms = torch.tensor([0.0, 0.2, 0.25, 0.7, 0.75, 1 - 1e-16], dtype=torch.float64)[:, None]
    codes, log_probs = draw_codes(logits, uniforms, PLAIN)
    assert codes[:, 0].tolist() == [0, 0, 2, 2, 3, 3]
    torch.testing.assert_close(log_probs[:, 0].exp(), torch.tensor([0.25, 0.25, 0.5, 0.5, 0.25, 0.25]))


def test_draws_follow_the_probabilities() -> None:
    logits, count = some_logits(5), 40_000
    uniforms = torch.rand(count, 1, dtype=torch.float64, generator=generator(1))
    for options in (PLAIN, CodeOptions(temperature=0.5), CodeOptions(temperature=2.0)):
        codes, _ = draw_codes(logits.expand(count, 1, 5), uniforms, options)
        shares = codes[:, 0].bincount(minlength=5) / count
        torch.testing.assert_close(shares, (logits / options.temperature).softmax(0), rtol=0, atol=0.01)


def test_what_top_k_and_top_p_leave() -> None:
    """By hand: shares .4 .3 .2 .1; up to and with the first code past p, of what top-k leaves."""
    logits = torch.tensor([0.3, 0.1, 0.4, 0.2]).log()

    def left(top_k: int | None, top_p: float | None) -> list[int]:
        return filter_logits(logits, top_k, top_p).isfinite().nonzero().flatten().tolist()

    assert left(None, None) == left(9, None) == left(None, 1.0) == [0, 1, 2, 3]
    assert left(2, None) == [0, 2] and left(3, None) == [0, 2, 3]
    assert left(None, 0.39) == [2] and left(None, 0.41) == [0, 2] and left(None, 0.8) == [0, 2, 3]
    assert left(2, 0.55) == [2]  # of .4 and .3, the first has 4/7
    assert left(2, 0.58) == [0, 2]


def test_top_k_1_is_the_likeliest_code() -> None:
    logits = some_logits(200, 2, 30)
    uniforms = torch.rand(200, 2, dtype=torch.float64, generator=generator(1))
    codes, log_probs = draw_codes(logits, uniforms, CodeOptions(top_k=1))
    assert torch.equal(codes, logits.argmax(-1)) and (log_probs == 0).all()


def test_many_rows_are_drawn_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    head = PlainHead(some_logits(30, 8))
    step = CodeSampler(head, torch.device("cpu")).at(CodeOptions(top_p=0.9, choice_temperature=2.0))
    z, noise = some_logits(3, 20, 8), step.draw_noise([generator(7)], 20)[0]
    whole = step.sample(z, lambda logits: logits.mean(0), noise, record=True)
    monkeypatch.setattr(models.heads.discrete_sampler, "MAX_LOGITS", 7 * 3 * 30)
    parts = step.sample(z, lambda logits: logits.mean(0), noise, record=True)
    assert torch.equal(parts.tokens, whole.tokens)
    torch.testing.assert_close(parts.confidence, whole.confidence)
    torch.testing.assert_close(parts.record, whole.record)
    torch.testing.assert_close(whole.confidence, whole.record + 2 * noise[:, 1].float())


def test_noise_is_each_images_own() -> None:
    step = CodeSampler(PlainHead(some_logits(30, 8)), torch.device("cpu")).at(PLAIN)
    both, alone = (step.draw_noise([generator(seed) for seed in seeds], 50) for seeds in ((1, 2), (2,)))
    assert both.shape == (2, 50, 2) and both.dtype == torch.float64 and torch.equal(both[1:], alone)
    uniforms, gumbels = both[..., 0], both[..., 1]
    assert ((uniforms >= 0) & (uniforms < 1)).all() and gumbels.isfinite().all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_iter", [1, 3, 16])
def test_each_token_is_drawn_once(order: str, num_iter: int) -> None:
    """In as many iterations as asked for, none but the codebook's codes."""
    config = default_sampling("discrete", num_iter=num_iter, order=order, cfg_text=3.0, cfg_layout=3.0)
    output = drawn(config, [1, 2], labels=torch.tensor([3, 7]))
    codes = output.tokens[..., 0]
    assert torch.equal(codes, codes.long().float()) and codes.min() >= 0 and codes.max() < NUM_CODES
    assert output.orders.sort(dim=1).values.tolist() == [list(range(16))] * 2
    counts = config.masked_counts(16)
    for row in output.commit_steps:
        assert row.bincount(minlength=num_iter).tolist() == [a - b for a, b in pairwise(counts)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_are_used(schedule: str) -> None:
    config = default_sampling("discrete", num_iter=5, schedule=schedule)
    counts = config.masked_counts(16)
    found = drawn(config, [1]).commit_steps[0].bincount().tolist()
    assert found == [a - b for a, b in pairwise(counts)]


def test_one_token() -> None:
    for order in ORDERS:
        output = drawn(default_sampling("discrete", num_iter=1, order=order), [1, 2], side=1)
        assert output.tokens.shape == (2, 1, 1) and output.commit_steps.tolist() == [[0], [0]]


@pytest.mark.parametrize("order", ORDERS)
def test_an_image_does_not_depend_on_its_batch(order: str) -> None:
    config = default_sampling("discrete", order=order, cfg_text=2.0, cfg_layout=2.0)
    labels = torch.tensor([3, 7, 1])
    together = drawn(config, [1, 2, 3], labels=labels)
    for row in range(3):
        alone = drawn(config, [row + 1], labels=labels[row : row + 1])
        assert torch.equal(alone.tokens[0], together.tokens[row])
        assert torch.equal(alone.commit_steps[0], together.commit_steps[row])


@pytest.mark.parametrize("counts", [(5, 5), (5, 12), (16, 14), (0, 16)], ids=str)
@pytest.mark.parametrize("order", ["confidence", "halton"])
def test_known_codes_stay(order: str, counts: tuple[int, int]) -> None:
    """Any number in each image; an image is the same alone."""
    known = torch.zeros(2, 16, dtype=torch.bool)
    for row, count in enumerate(counts):
        known[row, torch.randperm(16, generator=generator(row))[:count]] = True
    given = KnownTokens(torch.randint(NUM_CODES, (2, 16, 1), generator=generator(9)).float(), known)
    output = drawn(default_sampling("discrete", num_iter=4, order=order), [1, 2], known=given)
    assert torch.equal(output.tokens[known], given.tokens[known])
    assert torch.equal(output.commit_steps == -1, known)
    for row, count in enumerate(counts):
        assert len(output.commit_steps[row].unique()) == min(4, 16 - count) + (count > 0)
    alone = drawn(
        default_sampling("discrete", num_iter=4, order=order), [2], known=KnownTokens(given.tokens[1:], known[1:])
    )
    assert torch.equal(alone.tokens[0], output.tokens[1])


@pytest.mark.parametrize("order", ["confidence", "random"])
def test_a_run_that_is_stopped_names_every_token_once(order: str) -> None:
    """Those that were drawn with their iteration, the others with one that was still to come."""
    config = default_sampling("discrete", num_iter=5, order=order)
    full = drawn(config, [1, 2])
    asked: list[int] = []
    output = drawn(config, [1, 2], should_stop=lambda: asked.append(1) or len(asked) > 2)
    assert torch.equal(output.orders.sort(dim=1).values, torch.arange(16).expand(2, -1))
    is_drawn = full.commit_steps < 2
    assert torch.equal(output.commit_steps < 2, is_drawn)
    assert torch.equal(output.tokens[is_drawn], full.tokens[is_drawn]) and (output.tokens[~is_drawn] == 0).all()


def test_recorded_log_probabilities_are_those_of_the_commit() -> None:
    """From the state before each token's iteration, with the guidance and temperature it was drawn with."""
    model = PlainMaskGIL(4)
    config = default_sampling("discrete", num_iter=5, cfg_text=3.0, cfg_layout=3.0, temperature=0.8, top_k=20)
    labels = torch.tensor([3, 7])
    output = drawn(config, [1, 2], labels=labels, record=True)
    log_probs = cast(CodeTrace, output.trace).log_probs
    for step in range(5):
        before = torch.where(output.commit_steps < step, output.tokens[..., 0].long(), MASK)
        counts = config.masked_counts(16)
        scale = 1 + 2 * (16 - max(1, counts[step + 1])) / 16
        full, null = (
            model.head.logits(model.run(before, model.embed_conditions(2, each, None, None, (4, 4)).base))[:, :, 0]
            for each in (labels, None)
        )
        guided = (null + scale * (full - null)) / 0.8
        expected = filter_logits(guided, 20, None).log_softmax(-1).gather(2, output.tokens.long())[..., 0]
        now = output.commit_steps == step
        torch.testing.assert_close(log_probs[now], expected[now], rtol=0, atol=1e-4)


def test_diffusers_scheduler_of_amused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It masks the least sure again; committing the surest is the same: equal codes in each of eight steps."""
    model, config = PlainMaskGIL(8), default_sampling("discrete", schedule="mar", choice_temperature=2.0)
    tape = CodeSampler(model.head, torch.device("cpu")).at(PLAIN).draw_noise([generator(5), generator(6)] * 4, 64)
    noise = tape.unflatten(0, (4, 2))  # two by two, [4, 2, 64, 2]
    seen: list[Tensor] = []

    def replayed(self: CodeStep, generators: list[torch.Generator], num_tokens: int) -> Tensor:
        replayed.calls += 1  # type: ignore[attr-defined]
        return noise[(replayed.calls - 1) % 4]  # type: ignore[attr-defined]

    replayed.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(CodeStep, "draw_noise", replayed)
    drawn(config, [1, 2], side=8, on_iteration=lambda _, tokens: seen.append(tokens[..., 0].long()))

    scheduler = amused.AmusedScheduler(mask_token_id=MASK)
    scheduler.set_timesteps(8)
    state = torch.full((2, 64), MASK)
    base = model.embed_conditions(2, None, None, None, (8, 8)).base
    for step, timestep in enumerate(scheduler.timesteps):
        uniforms, gumbels = noise[step % 4].unbind(-1)
        monkeypatch.setattr(amused.torch, "multinomial", partial(inverse_sums, uniforms))
        monkeypatch.setattr(amused, "gumbel_noise", lambda *_, gumbels=gumbels, **__: gumbels.float())
        state = scheduler.step(model.head.logits(model.run(state, base))[:, :, 0], timestep, state).prev_sample
        known = state != MASK
        assert torch.equal(seen[step][known], state[known])
        assert int(known.sum()) == 2 * (64 - config.masked_counts(64)[step + 1])


def inverse_sums(uniforms: Tensor, probs: Tensor, *_: object, **__: object) -> Tensor:
    sums = probs.double().cumsum(-1)  # [r, K]
    return (sums / sums[:, -1:] <= uniforms.flatten()[:, None]).sum(-1, keepdim=True)  # [r, 1]


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("discrete", {"num_sampling_steps": 20}, "num_sampling_steps is an option of the diffusion head, .* is discrete"),
    ("discrete", {"clip_x0": 3.0}, "clip_x0 is an option of the diffusion head"),
    ("discrete", {"temperature": 0.0}, "divides by temperature, got 0"),
    ("discrete", {"top_k": 0}, "top_k must be at least 1, got 0"),
    ("discrete", {"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
    ("discrete", {"choice_temperature": -1.0}, "choice_temperature .* got -1.0"),
    ("discrete", {"schedule": "steps"}, "schedule must be one of .* got 'steps'"),
    ("diffusion", {"top_k": 5}, "top_k is an option of the discrete head, but the head is diffusion"),
    ("diffusion", {"order": "confidence"}, "order confidence .* the diffusion head does not have"),
]


@pytest.mark.parametrize(("head", "options", "message"), REFUSED, ids=str)
def test_options_that_do_not_go_with_the_head(head: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        default_sampling(head, **options)


def test_the_defaults_of_the_discrete_head() -> None:
    config = default_sampling("discrete")
    assert (config.num_iter, config.order, config.schedule) == (8, "confidence", "arccos")
    options = [config.head_options(iteration) for iteration in range(8)]
    assert [each.choice_temperature for each in cast(list[CodeOptions], options)] == pytest.approx(
        [4.5 * (1 - step / 7) for step in range(8)]
    )
    assert replace(config, num_iter=1).head_options(0) == CodeOptions(choice_temperature=4.5)
    with pytest.raises(ValueError, match="options of the diffusion head, the model has the discrete head"):
        drawn(SamplingConfig(num_iter=4), [1])


def test_step_linear_guidance_grows_with_the_iteration() -> None:
    config = default_sampling("discrete", cfg_schedule="step_linear", num_iter=5)
    assert [guidance(5.0, config, 16, 3, step) for step in range(5)] == [1, 2, 3, 4, 5]
    assert guidance(5.0, replace(config, num_iter=1), 16, 0, 0) == 5
