"""The planner's laws: what it writes is a layout, whatever its weights; each place sees the tokens before it alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.planner import PADDING, Planner, PlannerConfig, draw_token, layout_of, layout_tokens, legal_tokens
from tests.helpers.tiny import shaken
from util.types import Layout, LayoutBatch, TextContext

CONFIG = PlannerConfig(num_categories=3, text_dim=8, max_objects=4, num_bins=9, width=16, depth=2, num_heads=2)
LAYOUTS = [
    Layout(torch.tensor([[0.5, 0.0, 0.625, 0.25], [0.25, 0.25, 1.0, 1.0]]), torch.tensor([1, 2])),
    Layout(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)),
]


@pytest.fixture(scope="module")
def planner() -> Planner:
    torch.manual_seed(0)
    model = Planner(CONFIG)
    shaken(model, 1, std=0.5)
    return model.eval()


def text(*lengths: int) -> TextContext:
    draws = torch.Generator().manual_seed(3)
    return TextContext.collate([torch.randn(length, 8, generator=draws) for length in lengths])


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def tokens_of(*layouts: Layout) -> Tensor:
    return layout_tokens(LayoutBatch.collate(layouts, CONFIG.max_objects), CONFIG)


def test_tokens_are_objects_by_falling_area_and_an_end() -> None:
    end, first = CONFIG.end, CONFIG.first_bin
    large, small = [2, first + 2, first + 2, first + 8, first + 8], [1, first + 4, first, first + 5, first + 2]
    assert tokens_of(*LAYOUTS).tolist() == [[*large, *small, end], [end, *[PADDING] * 10]]


def test_tokens_and_layouts_are_inverse_up_to_half_a_bin() -> None:
    draws = torch.Generator().manual_seed(0)
    for _ in range(50):
        corners = torch.rand(3, 2, 2, generator=draws).sort(dim=1).values
        layout = Layout(corners.flatten(1), torch.randint(3, (3,), generator=draws))
        found = layout_of(tokens_of(layout)[0], CONFIG)
        areas = (corners[:, 1] - corners[:, 0]).prod(-1)
        order = areas.argsort(descending=True)
        assert torch.equal(found.categories, layout.categories[order])
        is_wide = (corners[:, 1] - corners[:, 0]).min() > 1 / 8  # a thin box grows to one bin
        assert (found.boxes_xyxy - layout.boxes_xyxy[order]).abs().max() <= (0.5 if is_wide else 1.0) / 8 + 1e-6


def test_a_box_without_width_becomes_one_bin_wide_inside_the_picture() -> None:
    thin = Layout(torch.tensor([[0.999, 0.5, 1.0, 0.5001]]), torch.tensor([0]))
    assert layout_of(tokens_of(thin)[0], CONFIG).boxes_xyxy.tolist() == [[0.875, 0.5, 1.0, 0.625]]


@pytest.mark.parametrize("tokens", [[0, 4, 4, 5, 5], [0, 4, 4, 3, 3], []])
def test_what_has_no_end_is_no_layout(tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="END behind them"):
        layout_of(torch.tensor(tokens), CONFIG)


def test_a_thousand_layouts_of_random_weights_are_valid(planner: Planner) -> None:
    """`Layout` refuses what is none; equal and crossed edges are ruled out by masking, not by luck."""
    context = text(*[3, 5] * 125)
    counts = set()
    for temperature in (0.0, 0.5, 1.0, 10.0):
        for layout in planner.propose(context, generators(*range(250)), temperature):
            assert len(layout) <= CONFIG.max_objects
            assert (layout.boxes_xyxy[:, 2:] - layout.boxes_xyxy[:, :2] >= 1 / 8 - 1e-6).all()
            counts.add(len(layout))
    assert len(counts) > 2  # empty and full ones are among them


def test_the_real_tokens_are_legal_at_every_place() -> None:
    tokens = tokens_of(*LAYOUTS)
    chosen = legal_tokens(tokens, CONFIG).gather(2, tokens.clamp(min=0)[..., None])[..., 0]
    assert chosen[tokens != PADDING].all()


def test_as_many_boxes_as_asked_for_end_a_layout(planner: Planner) -> None:
    context = text(*[3] * 40)
    for limit in (0, 1, 2):
        layouts = planner.propose(context, generators(*range(40)), 10.0, limit)
        assert max(map(len, layouts)) == limit


def test_places_see_the_tokens_before_them_alone(planner: Planner) -> None:
    tokens, context = tokens_of(*LAYOUTS)[:1], text(4)
    logits = planner.logits(tokens, context)
    for place in range(tokens.shape[1] - 1):
        changed = tokens.clone()
        changed[0, place + 1 :] = CONFIG.end
        assert torch.allclose(planner.logits(changed, context)[:, : place + 1], logits[:, : place + 1], atol=1e-5)


def test_sampling_step_by_step_is_the_forward_pass(planner: Planner) -> None:
    """Keys and values of earlier tokens are kept: the likeliest layout is the likeliest token at each of its places."""
    context = text(4, 6)
    for row, layout in enumerate(planner.propose(context, generators(0, 1), temperature=0)):
        tokens, own = layout_tokens_in_order(layout), text(4, 6)
        logits = planner.logits(tokens[None], TextContext(*(part[row : row + 1] for part in vars(own).values())))
        assert torch.equal(logits.argmax(-1)[0], tokens)


def layout_tokens_in_order(layout: Layout) -> Tensor:
    """As they were written, which need not be by falling area."""
    corners = (layout.boxes_xyxy * (CONFIG.num_bins - 1)).round().long() + CONFIG.first_bin
    objects = torch.cat([layout.categories[:, None], corners], 1)
    return torch.cat([objects.flatten(), torch.tensor([CONFIG.end])])


def test_a_layout_depends_on_its_own_caption_and_generator_alone(planner: Planner) -> None:
    context = text(3, 7, 5)
    together = planner.propose(context, generators(5, 6, 7))
    for row, seed in enumerate((5, 6, 7)):
        part = TextContext(*(each[row : row + 1] for each in vars(context).values()))
        alone = planner.propose(part, generators(seed))[0]
        assert torch.equal(alone.boxes_xyxy, together[row].boxes_xyxy)


def test_a_caption_without_tokens_gives_finite_numbers(planner: Planner) -> None:
    empty = text(3).dropped(torch.tensor([True]))
    assert torch.isfinite(planner(tokens_of(LAYOUTS[0]), empty))


def test_gradients_reach_every_parameter(planner: Planner) -> None:
    model = Planner(CONFIG).train()
    model(tokens_of(*LAYOUTS), text(3, 5)).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_draws_follow_the_distribution_and_never_pick_what_is_ruled_out() -> None:
    logits = torch.tensor([-torch.inf, 0.0, 1.0, -torch.inf]).double()
    draws = torch.linspace(0, 1, 1001)[:-1].double()
    drawn = draw_token(logits.expand(1000, 4), draws, 1.0)
    shares = torch.bincount(drawn, minlength=4) / 1000
    assert shares.tolist() == pytest.approx([0, 0.269, 0.731, 0], abs=2e-3)
    assert draw_token(logits[None], draws[:1], 0).item() == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 15}, "width 15 is no multiple of num_heads 2"),
        ({"num_bins": 1}, "num_bins must be at least 2, got 1"),
        ({"num_categories": 0}, "num_categories must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
    ],
)
def test_sizes_that_fit_no_model_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_mistakes_of_a_call_are_named(planner: Planner) -> None:
    with pytest.raises(ValueError, match="got 2 and 1"):
        planner.propose(text(3, 3), generators(0))
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        planner.propose(text(3), generators(0), -1)


def test_overfits_eight_captions() -> None:
    """Eight captions, eight layouts: after training each caption gives its own, class by class and box by box."""
    torch.manual_seed(0)
    config = replace(CONFIG, width=32, dropout=0.0)
    draws = torch.Generator().manual_seed(1)
    layouts = []
    for count in (1, 2, 3, 4, 1, 2, 3, 4):
        corners = torch.rand(count, 2, 2, generator=draws).sort(dim=1).values
        layouts.append(Layout(corners.flatten(1), torch.randint(3, (count,), generator=draws)))
    tokens, context, model = tokens_of(*layouts), text(*[4] * 8), Planner(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model(tokens, context)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    proposed = model.propose(context, generators(*range(8)))
    for row, layout in enumerate(proposed):
        wanted = layout_of(tokens[row], config)
        assert torch.equal(layout.categories, wanted.categories)
        assert torch.equal(layout.boxes_xyxy, wanted.boxes_xyxy)
