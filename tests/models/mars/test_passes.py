"""Segments, caches and masks: what is read does not depend on how it is read, nor on what comes after it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.mars.losses import MarsObjective
from models.mars.masks import NO_BLOCK, attention_mask, with_bias
from models.mars.model import Mars, TextBatch
from models.mars.passes import Context, Segment, read_by_segments, read_mixed
from models.mars.sampling import DrawOptions, draw_images
from models.semvie import TEXT, VISUAL
from tests.helpers.language_models import FAMILIES, tiny_mars
from tests.helpers.mars_pairs import pairs, some_codes

ROWS = ((1, 4, 5), (1, 6, 7, 8, 9))
ALMOST = {"rtol": 0, "atol": 1e-5}


def segments_of(model: Mars, codes: Tensor, is_block: bool = False) -> list[Segment]:
    """Padded words, an image, padded words, and the image again, so that there is padding in between."""
    image = model.image_segment(model.closed(codes))
    return [
        model.text_segment(TextBatch.of(ROWS, "left")),
        Segment(image.embeddings, VISUAL, is_block=is_block),
        model.text_segment(TextBatch.of(ROWS, "right")),
        Segment(image.embeddings, VISUAL, is_block=is_block),
    ]


def shown(segments: list[Segment], states: list[Tensor]) -> Tensor:
    """The states of what is no padding, [n, D]."""
    pairs_ = zip(segments, states, strict=True)
    return torch.cat([x.flatten(0, 1) if each.valid is None else x[each.valid] for each, x in pairs_])


@pytest.mark.parametrize("is_block", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_segments_mixed_and_alone_are_the_same(family: str, is_block: bool) -> None:
    model, codes = tiny_mars(family), some_codes(2)
    with torch.no_grad():
        segments = segments_of(model, codes, is_block)
        wanted = read_by_segments(model.decoder, segments)
        mixed = read_mixed(model.decoder, segments)
        torch.testing.assert_close(shown(segments, mixed), shown(segments, wanted), **ALMOST)
        for row, ids in enumerate(ROWS):
            text = model.text_segment(TextBatch.of([ids], "left"))
            image = Segment(segments[1].embeddings[row : row + 1], VISUAL, is_block=is_block)
            alone = [text, image, text, image]
            found = read_by_segments(model.decoder, alone)
            here = [x[row : row + 1] if each.valid is None else x[row, each.valid[row]][None]
                    for each, x in zip(segments, wanted, strict=True)]  # fmt: skip
            torch.testing.assert_close(torch.cat(here, dim=1), torch.cat(found, dim=1), **ALMOST)


@pytest.mark.parametrize("family", FAMILIES)
def test_step_by_step_is_the_whole_segment(family: str) -> None:
    model, codes = tiny_mars(family), some_codes(2)
    with torch.no_grad():
        text = model.text_segment(TextBatch.of(ROWS, "left"))
        wanted = read_by_segments(model.decoder, [text, model.image_segment(model.opened(codes))])[1]
        context = Context(model.decoder)
        context.read(text)
        steps = [context.read(model.image_segment(row)) for row in model.opened(codes).split(1, dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), wanted, **ALMOST)


@pytest.mark.parametrize("mixed", [False, True])
def test_nothing_sees_what_comes_after_it(mixed: bool) -> None:
    model, codes = tiny_mars(), some_codes(2)
    read = read_mixed if mixed else read_by_segments
    other = codes.clone()
    other[:, 3] = (other[:, 3] + 1) % 8
    with torch.no_grad():
        one, two = ([*read(model.decoder, segments_of(model, each))] for each in (codes, other))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1][:, :4], two[1][:, :4])  # <img> and the codes before it
    changed = (one[1][:, 4:] != two[1][:, 4:]).any(-1)
    assert changed.all() and (one[2] != two[2]).any(-1)[:, 0].all()


def test_a_block_sees_all_of_itself_and_the_text_nothing_of_it() -> None:
    model, codes = tiny_mars(), some_codes(2)
    other = codes.clone()
    other[:, -1] = (other[:, -1] + 1) % 8
    with torch.no_grad():
        one, two = (read_mixed(model.decoder, segments_of(model, each, is_block=True)) for each in (codes, other))
    assert torch.equal(one[0], two[0]) and (one[1][:, 0] != two[1][:, 0]).any(-1).all()


def test_a_prefix_is_used_again_after_a_drop() -> None:
    model, codes = tiny_mars(), some_codes(2)
    with torch.no_grad():
        context = Context(model.decoder)
        context.read(model.text_segment(TextBatch.of(ROWS, "left")))
        first = context.read(model.image_segment(codes))
        context.drop_last()
        context.read(model.image_segment(some_codes(2, seed=9)[:, :3]))
        context.drop_last()
        again = context.read(model.image_segment(codes))
    assert torch.equal(first, again) and context.length == 5 + 8


def test_a_bias_on_attention_is_added_to_its_logits() -> None:
    model, codes = tiny_mars(), some_codes(2)
    segments = segments_of(model, codes, is_block=True)
    length = sum(map(len, segments))
    with torch.no_grad():
        plain, none = (
            read_mixed(model.decoder, segments, bias=each) for each in (None, torch.zeros(1, 1, length, length))
        )
        torch.testing.assert_close(shown(segments, none), shown(segments, plain), **ALMOST)
        far = torch.zeros(1, 1, length, length)
        far[..., 5:15, :5] = -1e4  # the image does not look at the words
        cut = read_mixed(model.decoder, segments, bias=far)
        changed = list(segments)
        changed[0] = model.text_segment(TextBatch.of([[3, 3, 3], [3, 3, 3, 3, 3]], "left"))
        again = read_mixed(model.decoder, changed, bias=far)
    assert not torch.allclose(cut[1], plain[1], atol=1e-3)
    torch.testing.assert_close(again[1], cut[1], **ALMOST)


def test_masks_by_hand() -> None:
    valid = torch.tensor([[False, True, True, True]])
    mask = attention_mask(valid, torch.tensor([NO_BLOCK, NO_BLOCK, 0, 0]), 3)[0, 0]
    assert mask.int().tolist() == [[0, 1, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1]]
    assert attention_mask(valid, torch.full((4,), NO_BLOCK), 4)[0, 0, 0].tolist() == [True, False, False, False]
    biased = with_bias(mask[None, None], torch.ones(1, 1, 3, 4), torch.bfloat16)
    assert biased.dtype == torch.bfloat16 and biased[0, 0, 0].tolist() == [-torch.inf, 1, -torch.inf, -torch.inf]
    with pytest.raises(ValueError, match=r"the bias is \(1, 1, 4, 4\), the mask \(1, 1, 3, 4\)"):
        with_bias(mask[None, None], torch.ones(1, 1, 4, 4), torch.float32)
    with pytest.raises(ValueError, match="is not finite"):
        with_bias(mask[None, None], torch.full((1, 1, 3, 4), -torch.inf), torch.float32)


def gradients(model: Mars, checkpointing: bool | None, foreign_pass: bool = False) -> dict[str, Tensor]:
    """Of a step of drawing and describing. checkpointing: None reads by segments, False mixed, True mixed and layers
    computed again."""
    model.set_grad_checkpointing(bool(checkpointing))
    if checkpointing is False:
        model.read = lambda segments: read_mixed(model.decoder, segments)  # type: ignore[method-assign]
    model.train().zero_grad()
    loss = MarsObjective(model)(pairs()).total
    if foreign_pass:  # the layers' routes are another pass's when they are computed again
        with torch.no_grad():
            model.decoder(inputs_embeds=torch.zeros(1, 2, 16), route=TEXT, use_cache=False)
    loss.backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_segments_of_mixed_passes_and_of_layers_computed_again(family: str) -> None:
    segments, mixed, again, foreign = (
        gradients(tiny_again(family), checkpointing, foreign_pass)
        for checkpointing, foreign_pass in ((None, False), (False, False), (True, False), (True, True))
    )
    assert segments.keys() == mixed.keys() == again.keys() and all("visual" in name for name in segments)
    for name, wanted in segments.items():
        torch.testing.assert_close(mixed[name], wanted, rtol=1e-4, atol=1e-5)
        assert torch.equal(again[name], mixed[name]) and torch.equal(foreign[name], mixed[name])


def tiny_again(family: str) -> Mars:
    torch.manual_seed(0)
    return tiny_mars(family)


def test_a_short_window_is_refused() -> None:
    model = tiny_mars("mistral", sliding_window=8)
    segment = model.text_segment(TextBatch.of([[1, 2, 3, 4, 5]], "left"))
    context = Context(model.decoder)
    context.read(segment)
    message = "10 positions do not fit into the sliding window of 8"
    with pytest.raises(ValueError, match=message):
        context.read(segment)
    assert context.length == 5
    with pytest.raises(ValueError, match=message):
        read_mixed(model.decoder, [segment, segment])


def test_more_positions_than_there_are_is_refused() -> None:
    model = tiny_mars(max_position_embeddings=8)
    message = "9 positions are more than the 8 that the language model is made for"
    with pytest.raises(ValueError, match=message):
        Context(model.decoder).read(model.image_segment(some_codes(1, grid=(3, 3))))
    with pytest.raises(ValueError, match=message):
        draw_images(model, [[1]], [1], [torch.Generator()], DrawOptions())


def test_words_before_an_image_are_the_language_models_own() -> None:
    """Bit by bit; where rows are padded, up to the positions that padding moves."""
    model = tiny_mars()
    for rows in (ROWS, ROWS[:1]):
        text = TextBatch.of(rows, "left")
        with torch.no_grad():
            options = {} if text.valid is None else {"attention_mask": text.valid.long()}
            wanted = model.lm(input_ids=text.ids, **options).logits
            image = model.image_segment(some_codes(len(rows)))
            states, _ = read_by_segments(model.decoder, [model.text_segment(text), image])
            found = model.word_logits(states)
        if text.valid is None:
            assert torch.equal(found, wanted)
        torch.testing.assert_close(found[text.shown()], wanted[text.shown()], **ALMOST)


def test_checkpointing_refuses_a_cache() -> None:
    model = tiny_mars().train()
    model.set_grad_checkpointing(True)
    with pytest.raises(ValueError, match="take the mixed pass"):
        Context(model.decoder).read(model.text_segment(TextBatch.of([[1]], "left")))


def test_segments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"valid must be bool of \(2, 3\) as the embeddings, got torch.bool of \(2, 4\)"
    ):
        Segment(torch.zeros(2, 3, 4), TEXT, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"must be \[B, t, D\], got \(2, 3\)"):
        Segment(torch.zeros(2, 3), TEXT)
