"""Five captions for a scene: they name objects, colours, counts, places and relations in short English sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight"}
CLEAR_GAP = 0.15  # centres closer than this (relative to the image) are not called left, right, above or below
_SMALL, _LARGE = 0.28, 0.5  # lengths, relative to the image
NUM_CAPTIONS = 5


@dataclass(frozen=True)
class Named:
    """What a caption needs to know of an object; centre and length are relative to the image."""

    noun: str
    colour: str | None  # where captions name it
    centre: tuple[float, float]
    length: float

    @property
    def words(self) -> str:
        return self.noun if self.colour is None else f"{self.colour} {self.noun}"

    @property
    def size(self) -> str:
        """One of "small", "large" and "", which lies between them."""
        return "small" if self.length < _SMALL else "large" if self.length > _LARGE else ""

    @property
    def phrase(self) -> str:
        """With its size, where it has one: "large red umbrella"."""
        return f"{self.size} {self.words}".lstrip()


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def count_phrases(objects: Sequence[Named]) -> list[str]:
    """One phrase for each kind (noun and colour) in order of appearance: ["a red kite", "two oranges"]."""
    return _count([item.words for item in objects])


def sized_phrases(objects: Sequence[Named]) -> list[str]:
    """The same with sizes: ["a large red kite", "two small oranges"]."""
    return _count([item.phrase for item in objects])


def _count(names: Sequence[str]) -> list[str]:
    counts = Counter(names)  # keeps the order of appearance
    return [with_article(words) if n == 1 else f"{NUMBERS[n]} {words}s" for words, n in counts.items()]


def _relation(first: Named, second: Named, rng: np.random.Generator, sideways: bool) -> str | None:
    """ "a red kite to the left of a clock", or None where the two are not clearly apart in that direction."""
    axis = 0 if sideways else 1
    gap = first.centre[axis] - second.centre[axis]
    if abs(gap) < CLEAR_GAP:
        return None
    if sideways:
        words = ["to the left of", "left of"] if gap < 0 else ["to the right of", "right of"]
    else:
        words = ["above"] if gap < 0 else ["below", "under"]
    return f"{with_article(first.words)} {words[int(rng.integers(len(words)))]} {with_article(second.words)}"


def _pair_caption(objects: Sequence[Named], place: str, rng: np.random.Generator, sideways: bool) -> str | None:
    order = rng.permutation(len(objects))
    first, second = objects[order[0]], objects[order[1]]
    relation = None if first.words == second.words else _relation(first, second, rng, sideways)
    if relation is None:
        return None
    rest = [objects[i] for i in range(len(objects)) if i not in (order[0], order[1])]
    return f"{relation}, with {join(count_phrases(rest))}, {place}" if rest else f"{relation} {place}"


def write_captions(objects: Sequence[Named], place: str, rng: np.random.Generator) -> list[str]:
    """Five captions. The first three never say left or right, so that a horizontal flip leaves them true."""
    shuffled = [objects[i] for i in rng.permutation(len(objects))]
    listed, listed_again = join(count_phrases(objects)), join(count_phrases(shuffled))
    plain = [f"{listed} {place}", listed_again]
    total = f"{NUMBERS[len(objects)]} objects: {listed}" if len(objects) > 1 else f"one {objects[0].words} {place}"
    verb = "there is" if listed_again[:2] in ("a ", "an") else "there are"
    openings = [f"a picture of {listed} {place}", f"{verb} {listed_again} {place}", total]
    captions = [*plain, openings[int(rng.integers(len(openings)))]]
    sized = f"{join(sized_phrases(shuffled))} {place}"
    if len(objects) == 1:
        return [*captions, sized, f"{listed} alone {place}"]
    for sideways in (False, True):
        captions.append(
            _pair_caption(objects, place, rng, sideways) or (sized if sideways else f"{listed_again} {place}")
        )
    return captions
