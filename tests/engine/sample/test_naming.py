"""Which words of a caption name which box, in tokens of the committed text encoder."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from engine.data.scenes import Scene
from engine.sample.naming import named_tokens, phrase_weights, told_names
from models.frozen.text import ClipTextEncoder
from tests.conftest import ROOT
from util.types import Layout


@cache
def encoder() -> ClipTextEncoder:
    return ClipTextEncoder.load(ROOT / "pretrained_models" / "mini" / "clip-text-mini")


def scene(prompt: str, labels: list[str], phrases: tuple[str, ...] = ()) -> Scene:
    count = len(labels)
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.5]]).repeat(count, 1)
    return Scene(prompt, Layout(boxes, torch.zeros(count, dtype=torch.int64), phrases), labels)


@pytest.mark.parametrize(
    ("caption", "phrase", "number", "span"),
    [
        ("a red apple and a kite", "red apple", 0, (2, 4)),
        ("two oranges, a vase", "orange", 0, (2, 3)),
        ("a kite above a kite", "kite", 1, (5, 6)),
        ("a stop sign.", "stop sign", 0, (2, 4)),
        ("a pineapple", "apple", 0, None),
        ("an apple-kite", "kite", 0, (4, 5)),
    ],
)
def test_tokens_of_phrases(caption: str, phrase: str, number: int, span: tuple[int, int] | None) -> None:
    """Counted from the beginning-of-text token on."""
    assert encoder().phrase_tokens(caption, phrase, number) == (None if span is None else range(*span))


def test_equal_labels_take_the_places_in_turn_and_a_phrase_comes_before_its_label() -> None:
    assert named_tokens(encoder(), scene("a kite above a kite", ["kite", "kite", "kite"])) == [
        range(2, 3), range(5, 6), None
    ]  # fmt: skip
    assert named_tokens(encoder(), scene("two kites", ["kite", "kite"])) == [range(2, 3)] * 2
    prompt = "a red kite above a blue kite"
    assert named_tokens(encoder(), scene(prompt, ["kite", "kite"], ("blue kite", "red kite"))) == [
        range(6, 8), range(2, 4)
    ]  # fmt: skip
    assert named_tokens(encoder(), scene(prompt, ["kite", "vase"], ("large kite", ""))) == [range(3, 4), None]


def test_weights() -> None:
    """A box's tokens share 1; without a name there is nothing, as in an empty caption or a scene without boxes."""
    scenes = [scene("a stop sign and a kite", ["kite", "stop sign", "vase"]), scene("", ["kite"]), scene("a kite", [])]
    weights = phrase_weights(encoder(), scenes, 9, 4)  # [3, 9, 4]
    assert weights.shape == (3, 9, 4) and weights.sum() == 2
    assert weights[0, :, 0].nonzero().flatten().tolist() == [6]
    assert weights[0, :, 1].tolist() == [0, 0, 0.5, 0.5, 0, 0, 0, 0, 0]
    assert told_names(encoder(), scenes) == "the captions name 2 of 4 boxes"
