"""Where a caption names something."""

from __future__ import annotations

import pytest

from util.phrases import phrase_span


@pytest.mark.parametrize(
    ("caption", "phrase", "number", "found"),
    [
        ("a red apple and a kite", "red apple", 0, "red apple"),
        ("A Red  Apple", "red apple", 0, "Red  Apple"),
        ("two oranges, a vase", "orange", 0, "oranges"),
        ("two oranges, a vase", "orange", 4, "oranges"),
        ("a stop sign.", "stop sign", 0, "stop sign"),
        ("an apple-kite", "kite", 0, "kite"),
        ("three buses", "bus", 2, "buses"),
        ("Two people", "person", 1, "people"),
        ("a pineapple", "apple", 0, None),
        ("a kite", "kite", 1, None),
        ("a dog", "cat", 0, None),
        ("a dog", " ", 0, None),
        ("costs $5 (or so)", "(or so)", 0, "(or so)"),
    ],
)
def test_phrases(caption: str, phrase: str, number: int, found: str | None) -> None:
    span = phrase_span(caption, phrase, number)
    assert (span if span is None else caption[slice(*span)]) == found


def test_each_number_is_the_next_place() -> None:
    assert phrase_span("a kite above a kite", "kite", 0) == (2, 6)
    assert phrase_span("a kite above a kite", "kite", 1) == (15, 19)
    mixed = "a kite beside two kites"
    assert [phrase_span(mixed, "kite", number) for number in range(3)] == [(2, 6), (18, 23), (18, 23)]
