"""What a caption or a picture of the mini world tells of a scene: how many objects of which class, in which colours.

A scene is a count of kinds (noun and colour). A caption is read by the words that captions.py and chinese.py write:
number, size, colour and noun. A picture is read by a detector and the colours of its pixels. All are then compared in
the same way, so that what is drawn and what is written have the same measures.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scripts.mini import chinese
from scripts.mini.captions import NUMBERS
from scripts.mini.drawing import CLASS_BY_ID
from scripts.mini.lm_training import LANGUAGES, load_captions
from scripts.mini.planned import share
from util.read import read_json


class Kind(NamedTuple):
    """colour: None where the class has one colour only."""

    noun: str
    colour: str | None


Kinds = Counter[Kind]


def _one_of(words: Sequence[str]) -> str:
    """The longest first, so that none hides behind its beginning."""
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


_NOUNS = {each.name: each.name for each in CLASS_BY_ID.values()}
_COUNTS = {"a": 1, "an": 1, "one": 1, **{word: number for number, word in NUMBERS.items()}}
_ENGLISH = re.compile(
    rf"\b({_one_of([*_COUNTS])}) (?:(?:small|large) )?(?:({_one_of([*chinese.COLOURS])}) )?({_one_of([*_NOUNS])})s?\b"
)
_CHINESE_COUNTS = {word: number for number, word in enumerate(chinese.NUMBERS) if word}
_CHINESE = re.compile(
    rf"({_one_of([*_CHINESE_COUNTS])})个(?:({_one_of([*chinese.COLOURS.values()])})的)?[大小]?"
    rf"({_one_of([*chinese.NOUNS.values()])})"
)
_CHINESE_COLOURS = {word: name for name, word in chinese.COLOURS.items()}
_CHINESE_NOUNS = {word: name for name, word in chinese.NOUNS.items()}


def kinds_of_caption(caption: str) -> Kinds:
    """What a caption in English or Chinese, or in both, names with a number: "two red kites", 两个红色的风筝."""
    found: Kinds = Counter()
    for number, colour, noun in _ENGLISH.findall(caption):
        found[Kind(noun, colour or None)] += _COUNTS[number]
    for number, colour, noun in _CHINESE.findall(caption):
        found[Kind(_CHINESE_NOUNS[noun], _CHINESE_COLOURS.get(colour))] += _CHINESE_COUNTS[number]
    return found


@dataclass(frozen=True)
class SceneKinds:
    """A scene of the dataset. captions: by language, those of `captions_<split>.json` in their order. path: of its
    picture."""

    image_id: int
    path: Path
    kinds: Kinds
    captions: Mapping[str, Sequence[str]]


def load_scene_kinds(root: Path, split: str, num_scenes: int) -> list[SceneKinds]:
    """The first scenes by id, with captions in every language. Raises FileNotFoundError naming the command that makes
    what is missing, ValueError for another dataset than the mini world's and for fewer scenes."""
    path = root / "annotations" / f"instances_{split}.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: make it with python -m scripts.mini.make_dataset")
    content = read_json(path, "instances")
    images = sorted(content["images"], key=lambda image: image["id"])[:num_scenes]
    if len(images) < num_scenes:
        raise ValueError(f"{path} has {len(images)} images, --num_scenes asks for {num_scenes}")
    has_colours = bool(content["info"].get("colour_words", True))
    kinds: dict[int, Kinds] = {image["id"]: Counter() for image in images}
    for annotation in content["annotations"]:
        if annotation["category_id"] not in CLASS_BY_ID:
            raise ValueError(f"{path}: category id {annotation['category_id']} is not one of {sorted(CLASS_BY_ID)}")
        if annotation["image_id"] in kinds:
            colour = annotation.get("colour") if has_colours else None
            kinds[annotation["image_id"]][Kind(CLASS_BY_ID[annotation["category_id"]].name, colour)] += 1
    captions = {language: load_captions(root, split, language, num_scenes) for language in LANGUAGES}
    return [
        SceneKinds(
            image["id"],
            root / split / image["file_name"],
            kinds[image["id"]],
            {language: of[row] for language, of in captions.items()},
        )
        for row, image in enumerate(images)
    ]


@dataclass(frozen=True)
class Tally:
    """Of one scene. objects: in it; found: those that are told, by class, each counted once; told: in all. classes: in
    the scene; counted: those told in the right number. coloured: objects found of classes with several colours;
    matched: in their colour. is_exact: 1 where kinds and numbers are the scene's."""

    objects: int
    found: int
    told: int
    classes: int
    counted: int
    coloured: int
    matched: int
    is_exact: int
    scenes: int = 1


def tally(scene: Kinds, told: Kinds) -> Tally:
    wanted, named = _by_noun(scene), _by_noun(told)
    with_colours = {kind.noun for kind in scene if kind.colour is not None}
    found = wanted & named
    both = scene & told
    return Tally(
        objects=wanted.total(),
        found=found.total(),
        told=named.total(),
        classes=len(wanted),
        counted=sum(named[noun] == number for noun, number in wanted.items()),
        coloured=sum(found[noun] for noun in with_colours),
        matched=sum(number for kind, number in both.items() if kind.colour is not None),
        is_exact=int(scene == told),
    )


def _by_noun(kinds: Kinds) -> Counter[str]:
    found: Counter[str] = Counter()
    for kind, number in kinds.items():
        found[kind.noun] += number
    return found


MEASURES = {
    "objects": ("found", "objects"),
    "precision": ("found", "told"),
    "counts": ("counted", "classes"),
    "colours": ("matched", "coloured"),
    "exact": ("is_exact", "scenes"),
}
"""Name -> (part, whole) of `Tally`, each summed over scenes."""
TITLES = {
    "objects": "objects told",
    "precision": "told that are there",
    "counts": "classes in the right number",
    "colours": "told objects in their colour",
    "exact": "whole scene right",
}


def result_row(tallies: Sequence[Tally], weights: np.ndarray) -> dict[str, Any]:
    """Every measure as an `Interval`. weights: [R, scenes], of the bootstrap."""
    return {name: asdict(share(tallies, *parts, weights)) for name, parts in MEASURES.items()}


def percent(value: Mapping[str, float]) -> str:
    return f"{100 * value['value']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def format_rows(head: str, rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The lines of a Markdown table of `result_row`s, in percent."""
    lines = [f"| {head} | {' | '.join(TITLES.values())} |", "|---" * (1 + len(TITLES)) + "|"]
    return lines + [f"| {name} | {' | '.join(percent(row[each]) for each in TITLES)} |" for name, row in rows.items()]
