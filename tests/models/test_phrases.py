"""Phrases of boxes in the model: nothing at the start, a class's place or beside it later, weights of before them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.config import StructMARConfig
from models.structmar import StructMAR
from models.weights import PHRASE_PARTS, load_structmar_weights, select_trainable
from tests.helpers.family import HEADS, TRUNKS, family_config, some_latents
from tests.helpers.structured import generator
from tests.helpers.tiny import shaken
from util.types import UNKNOWN, Layout, LayoutBatch, TextContext

PARTS: dict[str, Any] = {"num_categories": 4, "text_dim": 12}
KINDS = [(trunk, head) for trunk in TRUNKS for head in HEADS]


def model_of(trunk: str = "single", head: str = "discrete", phrases: bool = True) -> StructMAR:
    torch.manual_seed(0)
    return StructMAR(family_config(trunk, head, **PARTS, phrases=phrases)).eval()


def boxes(categories: tuple[int, int], states: Tensor | None = None) -> LayoutBatch:
    """Two images, the second of them with one box alone. states: [2, 4, C]."""
    corners = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]])
    both = Layout(corners, torch.tensor(categories), ("a", "b"))
    alone = Layout(corners[:1], torch.tensor(categories[:1]), ("a",))
    return replace(LayoutBatch.collate([both, alone], 4), phrases=states)


def some_states(seed: int = 0) -> Tensor:
    """[2, 4, C], zeros in slots without a box."""
    states = torch.randn(2, 4, PARTS["text_dim"], generator=generator(seed))
    states[0, 2:], states[1, 1:] = 0, 0
    return states


def loss(model: StructMAR, layout: LayoutBatch) -> Tensor:
    text = TextContext.collate([torch.randn(3, PARTS["text_dim"], generator=generator(row)) for row in range(2)])
    noise = model.sample_training_noise(2, generator(5), 0.7)
    value: Tensor = model(some_latents(model), noise, text=text, layout=layout)
    return value


@pytest.mark.parametrize(("trunk", "head"), KINDS)
def test_at_the_start_phrases_change_nothing(trunk: str, head: str) -> None:
    """Whatever boxes say; the parts draw no random numbers, so that all other weights are the same too."""
    without, with_parts = model_of(trunk, head, phrases=False), model_of(trunk, head)
    assert set(with_parts.state_dict()) - set(without.state_dict()) == set(PHRASE_PARTS)
    for name, tensor in without.state_dict().items():
        assert torch.equal(with_parts.state_dict()[name], tensor), name
    wanted = loss(without, boxes((0, 3)))
    assert torch.equal(loss(with_parts, boxes((0, 3))), wanted)
    assert torch.equal(loss(with_parts, boxes((0, 3), some_states())), wanted)


@pytest.mark.parametrize(("trunk", "head"), KINDS)
def test_phrases_and_classes_both_count_and_unknown_boxes_share_a_row(trunk: str, head: str) -> None:
    model = model_of(trunk, head)
    shaken(model, 1, 0.3)
    told = boxes((0, 3), some_states())
    variants = [boxes((0, 3)), told, boxes((0, 3), some_states(1)), boxes((UNKNOWN, 3), some_states()), boxes((1, 3))]
    with torch.no_grad():
        losses = [float(loss(model, each)) for each in variants]
        assert len(set(losses)) == len(losses)
        tokens = model.layout_embed(boxes((UNKNOWN, UNKNOWN)))  # [2, 4, D]
        places = model.layout_embed(boxes((0, 3))) - model.layout_embed.class_emb(torch.tensor([[0, 3, 0, 0]] * 2))
    named = tokens - places
    assert torch.allclose(named[0, 0], named[0, 1], atol=1e-5) and torch.allclose(named[0, 0], named[1, 0], atol=1e-5)


def test_a_token_is_the_sum_that_the_formula_says() -> None:
    model = model_of()
    shaken(model, 1, 0.3)
    states, embed = some_states(), model.layout_embed
    with torch.no_grad():
        added = embed(boxes((0, UNKNOWN), states)) - embed(boxes((0, UNKNOWN)))  # [2, 4, D]
        expected = states @ embed.phrase.T  # [2, 4, D]
    torch.testing.assert_close(added, expected, atol=1e-5, rtol=1e-5)
    assert not added[1, 1:].any()  # slots without a box have the null token as ever


def test_dropped_boxes_lose_their_phrases() -> None:
    model = model_of()
    shaken(model, 1, 0.3)
    everything = torch.ones(2, dtype=torch.bool)
    with torch.no_grad():
        dropped = model.layout_embed(boxes((0, 3), some_states()).dropped(everything))
        assert torch.equal(dropped, model.layout_embed.null_tokens(2, 4))


@pytest.mark.parametrize("has_phrases", [False, True])
def test_every_part_gets_a_gradient_whether_or_not_a_batch_has_phrases(has_phrases: bool) -> None:
    model = model_of().train()
    shaken(model, 1, 0.3)
    chosen = select_trainable(model, "text_layout")
    assert set(PHRASE_PARTS) <= set(chosen)
    loss(model, boxes((0, 3), some_states() if has_phrases else None)).backward()
    assert [name for name, parameter in chosen.items() if parameter.grad is None] == []
    assert bool(model.layout_embed.phrase.grad.any()) == has_phrases


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="boxes with phrases were given, but the model was built with phrases=False"):
        loss(model_of(phrases=False), boxes((0, 3), some_states()))
    with pytest.raises(ValueError, match="phrases have 6 channels, the model's text_dim is 12"):
        loss(model_of(), boxes((0, 3), some_states()[..., :6]))
    with pytest.raises(ValueError, match="phrases of boxes need layout and text parts"):
        family_config(phrases=True)


def test_weights_of_before_are_taken_only_where_a_run_may_add_the_parts() -> None:
    state = model_of(phrases=False).state_dict()
    with pytest.raises(ValueError, match=r"missing \['layout_embed.unknown', 'layout_embed.phrase'\]"):
        load_structmar_weights(model_of(), state, "f")
    report = load_structmar_weights(model_of(), state, "f", PHRASE_PARTS)
    assert set(report.new) == set(PHRASE_PARTS)
    with pytest.raises(ValueError, match="unknown"):
        load_structmar_weights(model_of(phrases=False), model_of().state_dict(), "f", PHRASE_PARTS)


def test_configs_of_before_mean_no_phrases() -> None:
    older = {name: value for name, value in family_config(**PARTS).to_dict().items() if name != "phrases"}
    assert StructMARConfig.from_dict(older) == family_config(**PARTS)
