"""What MARS learns from: the numbers by hand, and what they do not depend on."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from models.mars.losses import MarsObjective, Pairs, describing_loss, drawing_losses
from models.mars.model import Mars, MarsConfig, TextBatch
from tests.helpers.language_models import DEFAULT, FAMILIES, GRID, NUM_CODES, tiny_mars
from tests.helpers.mars_pairs import BOS, EOS, pairs, some_codes

ALMOST = {"rtol": 0, "atol": 1e-5}


@pytest.mark.parametrize("num_codes", [8192, 1024, 32])
def test_a_head_at_zero_gives_the_logarithm_of_the_number_of_codes(num_codes: int) -> None:
    model = Mars(FAMILIES[DEFAULT](), MarsConfig(num_codes, GRID), torch.Generator().manual_seed(0))
    drawing, choice = drawing_losses(model, pairs(), with_choice=True)
    assert drawing.item() == pytest.approx(math.log(num_codes), abs=1e-5)
    assert choice is not None and choice.item() > 0


def test_the_losses_are_those_of_one_pass_after_the_other() -> None:
    model, some = tiny_mars(), pairs(captions=[(4, 5, 6)])
    ids, answer = torch.tensor([[BOS, 4, 5, 6]]), [4, 5, 6, EOS]
    with torch.no_grad():
        words, image = model.text_segment(TextBatch(ids)), model.image_segment(model.opened(some.codes[:, :-1]))
        text_states, states = model.read([words, image])
        log_probs = model.code_logits(states).log_softmax(-1)[0]
        drawing = -sum(log_probs[i, code] for i, code in enumerate(some.codes[0].tolist())) / 8
        begin = model.image_logits(text_states)[0].sigmoid()
        choice = -(begin[3].log() + (1 - begin[:3]).log().sum()) / 4
        found = drawing_losses(model, some, with_choice=True)
        torch.testing.assert_close(torch.stack([drawing, choice]), torch.stack(list(found)), **ALMOST)  # type: ignore[arg-type]

        opening, told = TextBatch(torch.tensor([[BOS]])), TextBatch(torch.tensor([answer[:-1]]))
        parts = [model.text_segment(opening), model.image_segment(model.closed(some.codes)), model.text_segment(told)]
        _, image_states, told_states = model.read(parts)
        logits = model.word_logits(torch.cat([image_states[:, -1:], told_states], dim=1))[0]
        describing = -sum(logits.log_softmax(-1)[i, word] for i, word in enumerate(answer)) / 4
        torch.testing.assert_close(describing_loss(model, some), describing, **ALMOST)


def test_the_total_is_the_weighted_sum() -> None:
    objective = MarsObjective(tiny_mars())
    with torch.no_grad():
        all_parts = objective(pairs(), caption_weight=0.5, choice_weight=2)
        alone = objective(pairs(), caption_weight=0)
    assert all_parts.total.item() == pytest.approx(
        (all_parts.drawing + 0.5 * all_parts.describing + 2 * all_parts.choice).item()
    )
    assert alone.describing is None and alone.choice is None and torch.equal(alone.total, alone.drawing)
    with pytest.raises(ValueError, match="weights must not be negative, got -1 and 0"):
        objective(pairs(), caption_weight=-1)


def test_padding_changes_nothing() -> None:
    model, captions = tiny_mars(), ((4, 5), (6, 7, 8, 9), (3,))
    codes = some_codes(3)
    with torch.no_grad():
        together = drawing_losses(model, pairs(captions, codes))[0]
        alone = [drawing_losses(model, pairs([each], codes[i : i + 1]))[0] for i, each in enumerate(captions)]
        torch.testing.assert_close(together, torch.stack(alone).mean(), **ALMOST)
        told = describing_loss(model, pairs(captions, codes))
        alone = [describing_loss(model, pairs([each], codes[i : i + 1])) for i, each in enumerate(captions)]
        weights = torch.tensor([3.0, 5.0, 2.0]) / 10
        torch.testing.assert_close(told, (weights * torch.stack(alone)).sum(), **ALMOST)


def test_an_empty_caption_without_bos_still_draws_and_teaches_no_choice() -> None:
    model = tiny_mars()
    none = pairs(captions=[(), ()])
    bare = replace(none, prompt=TextBatch.of([[], []], "left"), opening=torch.zeros(0, dtype=torch.int64))
    losses = MarsObjective(model)(bare, caption_weight=1, choice_weight=1)
    assert losses.total.isfinite() and losses.choice is not None and losses.choice == 0
    losses.total.backward()
    assert all(each.grad is None or each.grad.isfinite().all() for each in model.parameters())
    mixed = replace(pairs(captions=[(), (4, 5)]), prompt=TextBatch.of([[], [4, 5]], "left"))
    objective = MarsObjective(model)
    model.zero_grad()
    objective(mixed, caption_weight=1, choice_weight=1).total.backward()
    assert all(each.grad is None or each.grad.isfinite().all() for each in model.parameters())


@pytest.mark.parametrize("caption_weight", [0.0, 1.0])
def test_every_step_gives_every_expert_a_gradient(caption_weight: float) -> None:
    """DDP does not look for parameters that took no part."""
    model = tiny_mars().train()
    MarsObjective(model)(pairs(), caption_weight=caption_weight).total.backward()
    assert all(each.grad is not None and each.grad.any() for each in model.parameters() if each.requires_grad)


def test_the_choice_teaches_the_row_of_the_start_alone() -> None:
    model = tiny_mars().train()
    _, choice = drawing_losses(model, pairs(), with_choice=True)
    assert choice is not None
    choice.backward()
    learns = {name: each.grad for name, each in model.named_parameters() if each.grad is not None and each.grad.any()}
    assert list(learns) == ["visual_head.weight"]
    assert learns["visual_head.weight"].any(1).nonzero().flatten().tolist() == [NUM_CODES]


def test_a_dropped_caption_says_nothing_of_when_an_image_begins() -> None:
    model, codes = tiny_mars(), some_codes(2)
    with torch.no_grad():
        both = drawing_losses(model, pairs(captions=[(4, 5), ()], codes=codes), with_choice=True)[1]
        kept = drawing_losses(model, pairs(captions=[(4, 5)], codes=codes[:1]), with_choice=True)[1]
    torch.testing.assert_close(both, kept, **ALMOST)


def test_a_model_learns_a_pair() -> None:
    model = Mars(FAMILIES[DEFAULT](), MarsConfig(NUM_CODES, GRID), torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.02)
    objective, some = MarsObjective(model.train()), pairs()
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        losses.append(objective(some, caption_weight=1, choice_weight=1))
        losses[-1].total.backward()
        optimizer.step()
    first, last = losses[0], losses[-1]
    assert last.drawing < first.drawing / 10 and last.describing < first.describing / 1.5
    assert last.choice < first.choice


def test_the_new_rows_lie_about_the_mean_word() -> None:
    lm = FAMILIES["gemma3"]()  # it scales its rows
    nn.init.normal_(lm.get_input_embeddings().weight, 0.5, 0.02)
    words = lm.get_input_embeddings()(torch.arange(40)).detach()
    rows = Mars(lm, MarsConfig(4096, GRID), torch.Generator().manual_seed(0)).visual_embed.weight.detach()
    torch.testing.assert_close(rows.mean(0), words.mean(0), rtol=0, atol=0.01)
    assert rows.std(0).mean().item() == pytest.approx(0.02 * 4, rel=0.05)  # the square root of the width


def test_what_does_not_fit_is_refused() -> None:
    model, some = tiny_mars(), pairs()
    with pytest.raises(ValueError, match=r"images have 7 codes, the model's grid \(2, 4\) has 8"):
        MarsObjective(model)(replace(some, codes=some.codes[:, :7]))
    with pytest.raises(ValueError, match="got 2, 2 and 2"):
        Pairs(some.codes[:1], some.prompt, some.opening, some.answer, some.has_caption)
    with pytest.raises(ValueError, match="num_codes must be at least 2, got 1"):
        MarsConfig(1, GRID)
    with pytest.raises(ValueError, match=r"grid must be two numbers of at least 1, .*, got \(0, 4\)"):
        MarsConfig(8, (0, 4))
    with pytest.raises(ValueError, match="side must be left or right, got 'up'"):
        TextBatch.of([[1]], "up")


def test_logits_that_are_changed_after_the_head_are_refused() -> None:
    lm = FAMILIES["gemma3"](final_logit_softcapping=0.5)
    with pytest.raises(ValueError, match="Gemma3ForCausalLM changes the logits after its head, by up to"):
        Mars(lm, MarsConfig(NUM_CODES, GRID), torch.Generator())
