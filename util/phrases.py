"""Where a caption names something: whole words, in either case, in the singular or the plural."""

from __future__ import annotations

import re

IRREGULAR_PLURALS = {"person": "people", "knife": "knives", "mouse": "mice"}  # of COCO's names


def phrase_span(caption: str, phrase: str, number: int = 0) -> tuple[int, int] | None:
    """The characters [start, end) of the caption in which it names `phrase` for the `number`-th time, from 0.

    A plural names several: where there is no `number`-th time, the last plural stands for it. None where the caption
    does not name it, or not so often.
    """
    words = phrase.split()
    if not words:
        return None
    plural = IRREGULAR_PLURALS.get(words[-1].lower(), "")
    ends = f"(?P<plural>s|es)?|(?P<irregular>{plural})" if plural else "(?P<plural>s|es)?"
    stem = r"\s+".join(re.escape(word) for word in words[:-1]) + (r"\s+" if words[1:] else "")
    pattern = rf"(?<!\w){stem}(?:{re.escape(words[-1])}{ends})(?!\w)"
    named = list(re.finditer(pattern, caption, re.IGNORECASE))
    if number < len(named):
        return named[number].span()
    plurals = [each for each in named if any(each.groupdict().values())]
    return plurals[-1].span() if plurals else None
