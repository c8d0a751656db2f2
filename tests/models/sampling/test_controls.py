"""What steers the layout while an image is drawn: its schedule, the strength of boxes, no layout at all, and a negative
prompt."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.conditioning import Conditions
from models.masking import cosine_masked_counts, mask_from_orders, sample_orders
from models.sampling.config import SamplingConfig, default_sampling
from models.sampling.controls import FadingLayout, LayoutSchedule, NoControls, fade, faded_bias, own_controls
from models.sampling.guidance import embed_branches
from models.sampling.sampler import KnownTokens, sample
from models.structmar import StructMAR
from tests.helpers import reference
from tests.helpers.family import family_model
from tests.helpers.plain_model import plain_predict
from tests.helpers.structured import generator, some_layout, some_text, structured_model
from util.types import LayoutBatch, TextContext

QUICK = SamplingConfig(num_iter=5, num_sampling_steps=4, t_max=950, cfg_text=1.5, cfg_layout=3.0)
CODES = default_sampling("discrete", num_iter=4, cfg_text=2.0, cfg_layout=3.0)
NUM_TOKENS = 64

KINDS: dict[str, tuple[Callable[[], StructMAR], SamplingConfig]] = {
    "diffusion in mae": (structured_model, QUICK),
    "codes in single": (lambda: family_model(num_categories=5, text_dim=12), CODES),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def drawn(kind: str, layout: LayoutBatch | None, text: TextContext | None = None, **options: Any) -> Tensor:
    """Tokens [2, L, C] of the helpers' captions, but for those that are given."""
    make, config = KINDS[kind]
    states = {name: options.pop(name) for name in ("negative", "phrase_weights") if name in options}
    given = (some_text() if text is None else text, layout)
    return sample(make(), replace(config, **options), [generator(1), generator(2)], *given, **states).tokens


def nothing(layout: LayoutBatch) -> LayoutBatch:
    """A scene without objects."""
    return layout.dropped(torch.ones(len(layout), dtype=torch.bool))


def scaled(*scales: float) -> LayoutBatch:
    """The helpers' layouts, whose first image has two boxes and the second one, with these strengths of their own."""
    padded = torch.tensor([[*scales[:2], math.nan, math.nan], [scales[2], math.nan, math.nan, math.nan]])
    return replace(some_layout(), scales=padded)


# The schedule


def test_the_schedule_by_hand() -> None:
    """16 iterations of 64 tokens: the layout counts in full in nine, in part in two."""
    counts = cosine_masked_counts(NUM_TOKENS, 16)
    visible = [NUM_TOKENS - count for count in counts[:-1]]
    assert visible == [0, 1, 2, 3, 5, 8, 11, 15, 19, 24, 29, 34, 40, 46, 52, 58]
    strengths = [LayoutSchedule(0.3, 0.2).strength(count / NUM_TOKENS) for count in visible]
    assert strengths == pytest.approx([1] * 9 + [0.625, 0.234375] + [0] * 5)


@pytest.mark.parametrize(("on", "decay"), [(0.7, 0.2), (0.0, 0.49), (0.02, 0.98), (0.5, 0.0), (1.0, 0.0), (0.0, 0.0)])
def test_every_schedule_falls_from_one_to_nothing(on: float, decay: float) -> None:
    """1 up to `on`, 0 from `on + decay`, falling in between, for every share of an image."""
    schedule = LayoutSchedule(on, decay)
    shares = [step / 1000 for step in range(1000)]
    strengths = [schedule.strength(share) for share in shares]
    assert all(0 <= each <= 1 for each in strengths) and strengths == sorted(strengths, reverse=True)
    assert all(each == 1 for each, share in zip(strengths, shares, strict=True) if share < on)
    assert all(each < 1e-9 for each, share in zip(strengths, shares, strict=True) if share >= on + decay)


@pytest.mark.parametrize("value", [math.inf, 20.0, 2.0])
def test_what_attention_keeps_outside_of_boxes_is_linear(value: float) -> None:
    """e^bias goes from e^-v to 1 in a straight line, and stays 1 inside."""
    bias = torch.tensor([-value, 0.0])
    for strength in (0.0, 0.25, 0.9):
        expected = torch.tensor([1 - strength * (1 - math.exp(-value)), 1.0])
        torch.testing.assert_close(faded_bias(bias, strength).exp(), expected, rtol=1e-5, atol=1e-9)


def embedded(model: StructMAR, layout: LayoutBatch | None) -> Conditions:
    with torch.no_grad():
        return model.embed_conditions(2, text=some_text(), layout=layout)


def test_a_faded_layout_lies_between_none_and_all() -> None:
    model = structured_model()
    full, bare = embedded(model, scaled(0.5, 2.0, 3.0)), embedded(model, None)
    half = fade(full, bare, 0.5)
    assert full.layout_tokens is not None and bare.layout_tokens is not None and half.layout_tokens is not None
    torch.testing.assert_close(half.layout_tokens, (full.layout_tokens + bare.layout_tokens) / 2)
    assert half.layout_scales is not None and half.layout_scales[:, 0].tolist() == [0.75, 2.0]
    whole, gone = fade(full, bare, 1 - 1e-7), fade(full, bare, 0.0)
    torch.testing.assert_close(whole.layout_tokens, full.layout_tokens)
    assert (
        gone.layout_bias is None and gone.layout_scales is None and torch.equal(gone.layout_tokens, bare.layout_tokens)
    )


@every_kind
def test_a_layout_that_never_counts_is_a_scene_without_objects(kind: str) -> None:
    expected = drawn(kind, nothing(some_layout()))
    found = drawn(kind, some_layout(), layout_schedule=(0.0, 0.0))
    assert reference.relative_error(found, expected) < 1e-6
    assert reference.relative_error(drawn(kind, some_layout()), expected) > 1e-2


def test_a_layout_that_never_counts_asks_for_nothing_where_there_is_no_caption() -> None:
    """Without one, the sizes of the picture are no condition either."""
    config = replace(structured_model().config, size_condition=True)
    model = StructMAR(config).eval()
    model.load_state_dict(structured_model().state_dict(), strict=False)
    torch.nn.init.ones_(model.size_embed.mlp[-1].bias)
    no_text = some_text().dropped(torch.ones(2, dtype=torch.bool))
    outputs = []
    for options, layout in (({"layout_schedule": (0.0, 0.0)}, some_layout()), ({}, nothing(some_layout()))):
        config = replace(QUICK, **options)
        outputs.append(sample(model, config, [generator(1), generator(2)], no_text, layout).tokens)
    assert reference.relative_error(*outputs) < 1e-6


@every_kind
def test_a_layout_counts_as_it_is_until_its_schedule_says_otherwise(kind: str) -> None:
    """Tokens that are drawn before are those of the layout; later ones are others, and those of no layout too."""
    make, config = KINDS[kind]
    config = replace(config, order="random", num_iter=5)
    model, given = make(), (some_text(), some_layout())
    always, fading, never = (
        sample(model, replace(config, layout_schedule=schedule), [generator(1), generator(2)], *given)
        for schedule in ((1.0, 0.0), (0.3, 0.2), (0.0, 0.0))
    )
    counts = config.masked_counts(NUM_TOKENS)
    first = next(step for step, count in enumerate(counts) if 1 - count / NUM_TOKENS >= 0.3)
    before = always.commit_steps < first
    assert torch.equal(fading.tokens[before], always.tokens[before])
    assert not torch.equal(fading.tokens, always.tokens) and not torch.equal(fading.tokens, never.tokens)


def test_the_share_counts_what_was_known_before() -> None:
    """Where most of a picture is known, a layout that fades early never counts."""
    model = structured_model()
    known = torch.zeros(2, NUM_TOKENS, dtype=torch.bool)
    known[:, :40] = True
    start = KnownTokens(torch.randn(2, NUM_TOKENS, 16, generator=generator(9)), known)
    outputs = []
    for schedule, layout in (((0.3, 0.2), some_layout()), ((1.0, 0.0), nothing(some_layout()))):
        config = replace(QUICK, layout_schedule=schedule)
        outputs.append(sample(model, config, [generator(1), generator(2)], some_text(), layout, known=start).tokens)
    assert reference.relative_error(*outputs) < 1e-6


def test_only_the_layout_is_prepared_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions' keys and values are computed once, and nothing in iterations that change nothing."""
    model, prepared = structured_model(), []
    for name in ("prepare", "prepare_layout"):
        own = getattr(StructMAR, name)
        monkeypatch.setattr(
            StructMAR, name, lambda *given, own=own, name=name, **more: prepared.append(name) or own(*given, **more)
        )
    config = replace(QUICK, num_iter=16, layout_schedule=(0.3, 0.2))
    sample(model, config, [generator(1), generator(2)], some_text(), some_layout())
    assert prepared == ["prepare", *["prepare_layout"] * 4]  # the first prepares its layout by the same way; 3 changes


def test_changes_of_the_layout_are_runs_of_all_branches() -> None:
    """A difference to the full branch says nothing once that has changed."""
    model, config = structured_model(), replace(QUICK, num_iter=16, uncond_refresh=4, layout_schedule=(0.3, 0.2))
    controls = own_controls(model, config, some_text(), some_layout(), None, (8, 8))
    assert isinstance(controls, FadingLayout)
    visible = [1 - count / NUM_TOKENS for count in cosine_masked_counts(NUM_TOKENS, 16)[:-1]]
    changes = controls.changes(visible)
    assert changes == {9, 10, 11}
    plain, uses = config.branch_uses(3), config.branch_uses(3, changes)
    assert {i for i, use in enumerate(uses) if use != plain[i]} == {i for i in changes if plain[i] == "reuse"} != set()
    assert all(uses[i] == "run" for i in changes)


def test_a_changing_layout_with_reused_differences() -> None:
    """Where the layout does not count from the start, reusing differs from a scene without objects by nothing."""
    model = structured_model()
    config = replace(QUICK, num_iter=12, uncond_refresh=3)
    outputs = []
    for options, layout in (({"layout_schedule": (0.0, 0.0)}, some_layout()), ({}, nothing(some_layout()))):
        given = (some_text(), layout)
        outputs.append(sample(model, replace(config, **options), [generator(1), generator(2)], *given).tokens)
    assert reference.relative_error(*outputs) < 1e-6


def words() -> Tensor:
    """The captions name the first box of each image: [B, T, N]."""
    weights = torch.zeros(2, 5, 4)
    weights[:, 1, 0] = 1
    return weights


@pytest.mark.parametrize("updates", [False, True])
def test_auto_guidance_changes_from_its_start_on(updates: bool) -> None:
    """Once, or in every iteration; together with the schedule, wherever either does."""
    auto = replace(QUICK, num_iter=16, uncond_refresh=4, mask_threshold=0.5, start_step=5, auto_update=updates)
    given = (structured_model(), auto, some_text(), some_layout(), None, (8, 8), words())
    visible = [1 - count / NUM_TOKENS for count in cosine_masked_counts(NUM_TOKENS, 16)[:-1]]
    own = own_controls(*given).changes(visible)
    assert own == (set(range(5, 16)) if updates else {5})
    assert auto.branch_uses(3)[5] == "reuse" and auto.branch_uses(3, own)[5] == "run"
    both = own_controls(given[0], replace(auto, layout_schedule=(0.3, 0.2)), *given[2:])
    assert both.changes(visible) == own | {9, 10, 11}


@every_kind
def test_auto_guidance_comes_before_the_schedule(kind: str) -> None:
    """So a layout that never counts is none, whatever was found; and one that fades late is the found one first."""
    auto = {"mask_threshold": 0.5, "start_step": 1, "phrase_weights": words()}
    expected = drawn(kind, nothing(some_layout()))
    found = drawn(kind, some_layout(), layout_schedule=(0.0, 0.0), **auto)
    assert reference.relative_error(found, expected) < 1e-6
    late = drawn(kind, some_layout(), layout_schedule=(0.999, 0.0), **auto)
    assert torch.equal(late, drawn(kind, some_layout(), **auto))
    assert not torch.equal(late, drawn(kind, some_layout()))


# The strength of boxes


def test_a_strength_is_a_factor_on_attention() -> None:
    """Behind the softmax, in encoder and decoder, while training and while sampling: against the plain model."""
    model, layout = structured_model(), scaled(0.3, 2.0, 1.7)
    tokens = reference.tensors()["train.tokens"]
    kept = mask_from_orders(sample_orders(2, NUM_TOKENS, [generator()]), 40).kept_ids()
    with torch.no_grad():
        conditions = model.embed_conditions(2, None, some_text(), layout)
        expected = plain_predict(model, tokens, kept, conditions)
        for dtype in (None, torch.float32):
            found = model.predict(tokens, kept, model.prepare(conditions, dtype))
            assert reference.relative_error(found, expected) < 1e-5
        plain = plain_predict(model, tokens, kept, model.embed_conditions(2, None, some_text(), some_layout()))
    assert reference.relative_error(expected, plain) > 1e-3


@every_kind
def test_strengths_of_one_change_nothing(kind: str) -> None:
    expected = drawn(kind, some_layout())
    assert torch.equal(drawn(kind, scaled(1.0, 1.0, 1.0)), expected)
    assert torch.equal(drawn(kind, scaled(1.0, 1.0, 1.0), layout_scale=0.2), expected)  # they have their own


@every_kind
def test_one_strength_is_that_of_all_boxes_without_their_own(kind: str) -> None:
    expected = drawn(kind, scaled(0.2, 0.2, 0.7))
    assert torch.equal(drawn(kind, scaled(0.2, math.nan, 0.7), layout_scale=0.2), expected)
    assert torch.equal(drawn(kind, some_layout(), layout_scale=0.2), drawn(kind, scaled(0.2, 0.2, 0.2)))
    assert not torch.equal(drawn(kind, some_layout()), expected)


def test_an_image_has_its_own_strengths_in_any_batch() -> None:
    model = structured_model()
    both = sample(model, QUICK, [generator(1), generator(2)], None, scaled(0.1, 3.0, 0.5)).tokens
    for row in range(2):
        layout = scaled(0.1, 3.0, 0.5).map(lambda part, row=row: part[row : row + 1])
        alone = sample(model, QUICK, [generator(row + 1)], None, layout).tokens
        assert reference.relative_error(both[row : row + 1], alone) < 1e-5


# No layout


@every_kind
def test_dropped_boxes_are_a_scene_without_objects(kind: str) -> None:
    """Bit for bit, whatever their strengths."""
    expected = drawn(kind, nothing(some_layout()))
    for layout in (some_layout(), scaled(0.1, 3.0, 0.5)):
        assert torch.equal(drawn(kind, layout, drop_grounding_tokens=True, layout_scale=0.5), expected)


# The negative prompt


def caption(seed: int = 7) -> TextContext:
    return TextContext.collate([torch.randn(6, 12, generator=generator(seed))])


@every_kind
def test_the_caption_itself_as_negative_prompt_is_no_guidance(kind: str) -> None:
    both = caption().repeated(2)
    options = {"text": both, "cfg_schedule": "constant", "negative_prompt": "said", "negative": caption()}
    found = drawn(kind, None, **options)
    expected = drawn(kind, None, text=both, cfg_text=1.0, cfg_layout=1.0)
    assert reference.relative_error(found, expected) < 1e-5
    assert reference.relative_error(drawn(kind, None, text=both), expected) > 1e-2


@every_kind
def test_a_negative_prompt_leads_elsewhere(kind: str) -> None:
    """Than no caption, and than another one; with boxes and scales apart, too."""
    layout = some_layout()
    others = [drawn(kind, layout, negative_prompt="said", negative=caption(seed)) for seed in (7, 8)]
    assert not torch.equal(*others) and not torch.equal(others[0], drawn(kind, layout))


def test_the_branch_of_a_negative_prompt_is_that_of_a_caption() -> None:
    """Every row reads its own tokens, since the null token is no longer all that rows behind the captions see."""
    model = structured_model()
    with torch.no_grad():
        branches, _ = embed_branches(model, QUICK, 2, some_text(), some_layout(), None, negative=caption())
        stacked = branches.conditions
        tokens, kept = reference.tensors()["train.tokens"].repeat(3, 1, 1), torch.arange(20).repeat(6, 1)
        expected = plain_predict(model, tokens, kept, stacked)
        found = model.predict(tokens, kept, model.prepare(stacked, torch.float32))
    assert branches.names == ("full", "text", "null") and stacked.num_with_text == 6
    assert reference.relative_error(found, expected) < 1e-5


def test_a_negative_prompt_needs_guidance_and_its_states() -> None:
    with pytest.raises(ValueError, match="negative_prompt 'dark' is what guidance by the caption leads away from"):
        replace(QUICK, cfg_text=1.0, negative_prompt="dark")
    with pytest.raises(ValueError, match="negative_prompt is blank, got '  '"):
        replace(QUICK, negative_prompt="  ")
    with pytest.raises(ValueError, match="negative_prompt 'dark' goes with its encoded states, got none"):
        drawn("diffusion in mae", None, negative_prompt="dark")
    with pytest.raises(ValueError, match="negative_prompt None goes with its encoded states, got some"):
        drawn("diffusion in mae", None, negative=caption())


# What does not know of all this


@pytest.mark.parametrize(
    "option",
    [{"layout_schedule": (0.3, 0.2)}, {"layout_scale": 0.5}, {"drop_grounding_tokens": True},
     {"negative_prompt": "dark"}, {"mask_threshold": 0.5, "start_step": 2}],
    ids=lambda option: next(iter(option)),
)  # fmt: skip
def test_stage_3_refuses_them(option: dict[str, Any]) -> None:
    name = next(iter(option))
    for config in (QUICK, CODES):
        steered = replace(config, **option)
        refuse = steered.require_traceable if config is QUICK else steered.require_exact
        with pytest.raises(ValueError, match=rf"^{name} .* does not go with stage 3"):
            refuse()
        assert steered.for_rollouts() == config.for_rollouts()


def test_nothing_steers_by_default() -> None:
    model = structured_model()
    assert QUICK.controls == {}
    given = (some_text(), some_layout(), None, (8, 8))
    assert isinstance(own_controls(model, QUICK, *given), NoControls)
