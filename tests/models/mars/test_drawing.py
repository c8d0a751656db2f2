"""Drawing, describing, and both in one sequence."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from models.mars.decoding import Image, JointOptions, Part, Words, continue_sequence, describe_images
from models.mars.model import Mars, TextBatch
from models.mars.sampling import DrawOptions, draw_images
from tests.helpers.language_models import NUM_CODES, tiny_mars
from tests.helpers.mars_pairs import BOS, EOS, some_codes

PROMPTS = ([BOS, 4, 5], [BOS, 6, 7, 8, 9, 3], [BOS])
GRIDS = ((8, 8), (16, 16), (4, 8))


def own(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(model: Mars, indices: tuple[int, ...] = (0, 1, 2), **options: object) -> Tensor:
    """Of some of `PROMPTS`, each with the seed of its place."""
    prompts = [PROMPTS[index] for index in indices]
    settings = DrawOptions(**options)  # type: ignore[arg-type]
    return draw_images(model, prompts, [BOS], [own(index) for index in indices], settings)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
def test_an_image_does_not_depend_on_its_batch(guidance: float) -> None:
    model = tiny_mars()
    together = draw(model, guidance=guidance)
    assert together.shape == (3, 2, 4) and together.dtype == torch.int64
    assert together.min() >= 0 and together.max() < NUM_CODES
    for index in range(3):
        assert torch.equal(draw(model, (index,), guidance=guidance)[0], together[index])
    assert torch.equal(draw(model, (2, 0), guidance=guidance), together[[2, 0]])


def test_guidance_of_1_is_none_and_of_0_the_other_branch() -> None:
    model = tiny_mars()
    nothing = draw_images(model, [[BOS]] * 3, [BOS], [own(index) for index in range(3)], DrawOptions(guidance=1))
    assert torch.equal(draw(model, guidance=0), nothing)
    assert not torch.equal(draw(model, guidance=1), nothing)
    same = draw_images(model, PROMPTS, [9, 9], [own(index) for index in range(3)], DrawOptions(guidance=1))
    assert torch.equal(draw(model, guidance=1), same)
    near = draw(model, guidance=1 + 1e-9)
    assert torch.equal(near, draw(model, guidance=1))  # the guided formula, and the branch alone


def test_the_likeliest_codes_are_those_of_one_pass() -> None:
    """Guided logits of a whole pass over what was drawn name the same codes."""
    model, scale = tiny_mars(), 3.0
    codes = draw(model, (1,), guidance=scale, top_k=1).flatten(1)
    with torch.no_grad():
        image = model.image_segment(model.opened(codes[:, :-1]))
        wanted, other = (
            model.code_logits(model.read([model.text_segment(TextBatch.of([ids], "left")), image])[1])
            for ids in (PROMPTS[1], [BOS])
        )
    assert torch.equal((other + scale * (wanted - other)).argmax(-1), codes)


def test_codes_are_drawn_as_often_as_they_are_likely() -> None:
    model = tiny_mars()
    with torch.no_grad():
        text, start = model.text_segment(TextBatch.of([PROMPTS[0]], "left")), torch.empty(1, 0, dtype=torch.int64)
        states = model.read([text, model.image_segment(model.opened(start))])[1]
        probs = (model.code_logits(states)[0, 0] / 2).softmax(-1)
    many = 2000
    generators = [own(index) for index in range(many)]
    options = DrawOptions(guidance=1, temperature=2, grid=(1, 1))
    first = draw_images(model, [PROMPTS[0]] * many, [BOS], generators, options).flatten()
    shares = torch.bincount(first, minlength=NUM_CODES) / many
    assert (shares - probs).abs().max() < 4 * math.sqrt(0.25 / many)


def test_the_grid_is_the_one_that_is_asked_for() -> None:
    assert draw(tiny_mars(), (0, 1), grid=(3, 1)).shape == (2, 3, 1)


def test_nothing_at_all_can_be_a_prompt() -> None:
    """As of a language model without BOS."""
    model = tiny_mars()
    codes = draw_images(model, [[], [4, 5]], [], [own(0), own(1)], DrawOptions(guidance=2))
    alone = draw_images(model, [[]], [], [own(0)], DrawOptions(guidance=2))
    assert torch.equal(codes[0], alone[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": math.nan}, r"guidance must lie in \[0, 100\], got nan"),
        ({"temperature": 0}, "temperature must be above 0, got 0; top_k 1 draws the likeliest code"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"grid": (0, 2)}, r"grid must be two numbers of at least 1, \(rows, columns\), got \(0, 2\)"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DrawOptions(**options)  # type: ignore[arg-type]


def test_every_prompt_needs_its_generator() -> None:
    with pytest.raises(ValueError, match="got 2 prompts and 1 generators"):
        draw_images(tiny_mars(), PROMPTS[:2], [BOS], [own(0)], DrawOptions())


def greedy(model: Mars, ids: list[int], max_words: int) -> list[int]:
    """The language model's own generation."""
    rows = torch.tensor([ids])
    options = {"do_sample": False, "max_new_tokens": max_words, "eos_token_id": EOS, "pad_token_id": 0}
    return model.lm.generate(rows, attention_mask=torch.ones_like(rows), **options)[0, len(ids) :].tolist()


def test_a_description_is_the_likeliest_word_after_word() -> None:
    model, codes = tiny_mars(), some_codes(4)
    told = describe_images(model, codes, [BOS], [EOS], max_words=6)
    for row, words in zip(codes, told, strict=True):
        assert len(words) <= 6 and EOS not in words
        with torch.no_grad():
            parts = [model.text_segment(TextBatch(torch.tensor([[BOS]]))), model.image_segment(model.closed(row[None]))]
            rest = TextBatch(torch.tensor([words], dtype=torch.int64))
            states = model.read([*parts, *([model.text_segment(rest)] if words else [])])
        best = model.word_logits(torch.cat([states[1][:, -1:], *states[2:]], dim=1))[0].argmax(-1).tolist()
        assert best[: len(words)] == words and (len(words) == 6 or best[len(words)] == EOS)
    assert [describe_images(model, row[None], [BOS], [EOS], 6)[0] for row in codes] == told


def test_without_images_a_sequence_is_the_language_models_own() -> None:
    model = tiny_mars()
    for prompt in PROMPTS:
        options = JointOptions(max_words=12, max_images=0, end_ids=(EOS,), image_threshold=0)
        (words,) = continue_sequence(model, [Words(tuple(prompt))], [BOS], own(0), options)
        assert isinstance(words, Words) and list(words.ids) == greedy(model, prompt, 12)


@pytest.mark.parametrize(
    ("grid", "guidance"), [((2, 4), 0.0), ((2, 4), 1.0), ((2, 4), 3.0), *((grid, 1.0) for grid in GRIDS)]
)
def test_images_are_spans_of_exactly_their_grid(grid: tuple[int, int], guidance: float) -> None:
    model = tiny_mars(grid=grid)
    draw_options = DrawOptions(guidance=guidance)
    options = JointOptions(5, max_images=2, end_ids=(), image_threshold=0, draw=draw_options)
    parts = continue_sequence(model, [Words((BOS, 4, 5))], [BOS], own(3), options)
    images = [part for part in parts if isinstance(part, Image)]
    assert [each.codes.shape for each in images] == [grid, grid]
    assert all(type(one) is not type(two) for one, two in pairwise(parts))
    assert sum(len(part.ids) for part in parts if isinstance(part, Words)) == 5
    first = draw_images(model, [[BOS, 4, 5]], [BOS], [own(3)], draw_options)[0]
    assert torch.equal(images[0].codes, first)  # as a drawing of the prompt


def test_a_sequence_goes_on_as_one_that_was_read() -> None:
    """What comes after an image that was drawn is what comes after the same image as a part of the prompt."""
    model = tiny_mars()
    for guidance in (0.0, 1.0, 3.0):
        options = JointOptions(6, max_images=1, end_ids=(), image_threshold=0, draw=DrawOptions(guidance=guidance))
        start: list[Part] = [Words((BOS, 4, 5))]
        image, words = continue_sequence(model, start, [BOS], own(3), options)
        plain = JointOptions(6, max_images=0, end_ids=())
        assert continue_sequence(model, [*start, image], [BOS], own(3), plain) == [words]


def test_an_image_begins_only_above_the_threshold() -> None:
    model = tiny_mars()
    options = JointOptions(6, max_images=3, end_ids=(), image_threshold=1)
    assert all(isinstance(part, Words) for part in continue_sequence(model, [Words((BOS,))], [], own(0), options))


def test_impossible_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="the prompt has no word and no image"):
        continue_sequence(tiny_mars(), [Words(())], [], own(0), JointOptions(1, 0, ()))
    with pytest.raises(ValueError, match="got 0 and 0"):
        JointOptions(0, 0, ())
    with pytest.raises(ValueError, match=r"image_threshold must lie in \[0, 1\], got 2"):
        JointOptions(1, 0, (), image_threshold=2)
    with pytest.raises(ValueError, match="max_words must be at least 1, got 0"):
        describe_images(tiny_mars(), some_codes(1), [BOS], [EOS], 0)
