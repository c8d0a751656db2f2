"""Reads layout files of other projects, and writes GLIGEN's. What each format holds: layout_entries.py.

A file's format is told by the keys of its entries, or named. JSON may also be one entry a line (JSON lines). LayoutGPT's
text has no keys:

    Prompt: a dog left of a cat
    dog {height: 58px; width: 77px; top: 10px; left: 20px; }

Nothing here knows a model: `scenes.py` checks labels, numbers of boxes and all else of the entries that come out.
Every mistake is one ValueError that names the file, the entry, the object and the values; where a format decides what
they mean, it names the readings.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from util.box_readings import BoxReading, read_box
from engine.data.layout_entries import (
    GLIGEN,
    JSON_FORMATS,
    LAYOUTGPT,
    NSR1K,
    OURS,
    SIDECAR,
    Entry,
    LayoutFormat,
)
from util.buckets import Size
from util.read import parse_json_lines, read_text, short_path, short_repr
from util.sidecar_files import CAPTION_SUFFIX, SIDECAR_SUFFIX, category_name, read_boxes, read_captions

logger = logging.getLogger(__name__)

OnBad = Callable[[ValueError], None]
TEXT = "layoutgpt_text"
LAYOUT_FORMATS = (*(each.name for each in JSON_FORMATS), TEXT)
ALWAYS_ON = [1, 0, 0]  # GLIGEN's alpha_type: shares of the steps with boxes, with fewer and fewer, without
_TEXT_BOX = re.compile(r"^(?P<label>[^{}\n]*\S)\s*\{(?P<sides>[^{}\n]*)\}\s*$")
_TEXT_SIDE = re.compile(r"\s*(height|width|top|left)\s*:\s*(-?\d+(?:\.\d+)?)\s*px\s*")
_PX = BoxReading(sides=True, pixels=True)


@dataclass(frozen=True)
class FileFormat:
    """What a layout file is said to be. name: one of LAYOUT_FORMATS; None: its keys tell. canvas: (height, width) that
    pixels are shares of, where the file does not say."""

    name: str | None = None
    canvas: Size | None = None

    def __post_init__(self) -> None:
        if self.name is not None and self.name not in LAYOUT_FORMATS:
            raise ValueError(f"a layout's format must be one of {', '.join(LAYOUT_FORMATS)}, got {short_repr(self.name)}")


@dataclass(frozen=True)
class FoundEntry:
    """An entry as a layout file of ours has it. where: it stands; errors begin with it."""

    content: Any
    where: str


def read_entries(
    path: str | Path,
    said: FileFormat | None = None,
    names: Collection[str] = (),
    is_prompt_given: bool = False,
    on_bad: OnBad | None = None,
) -> list[FoundEntry]:
    """The entries of a layout file in any of the formats.

    is_prompt_given: whoever asks has a prompt, so that the .txt beside a .bbox file is not looked for. The rest is
    `parse_entries`'s. Raises FileNotFoundError or ValueError.
    """
    text, where = read_text(path, "layout file"), f"layout file {short_path(path)}"
    said, prompt, caption_file = said or FileFormat(), None, Path(path).with_suffix(CAPTION_SUFFIX)
    if Path(path).suffix == SIDECAR_SUFFIX and said.name is None:
        said = FileFormat(SIDECAR.name, said.canvas)
    if said.name == SIDECAR.name and not is_prompt_given and caption_file.is_file():
        captions = read_captions(caption_file)
        if not captions:
            raise ValueError(f"caption file {short_path(caption_file)} is blank: it is to say the prompt of {where}")
        prompt = captions[0]
    return parse_entries(text, where, said, names, on_bad, prompt)


def parse_entries(
    text: str,
    where: str,
    said: FileFormat | None = None,
    names: Collection[str] = (),
    on_bad: OnBad | None = None,
    sidecar_prompt: str | None = "",
) -> list[FoundEntry]:
    """The entries of a layout file's text; those of ours are not checked any further. where: errors begin with it.

    names: of categories, which labels of other formats may mean. on_bad: gets the error of an entry of another format
    that is wrong, which is left out then. sidecar_prompt: of a .bbox file, which says none itself; None: it gets none.
    Raises ValueError.
    """
    said = said or FileFormat()
    if said.name == TEXT or (said.name is None and _is_text(text)):
        return _each(
            _text_entries(text, where, said.canvas), lambda each: _text_entry(each, said.canvas, names), on_bad
        )
    if said.canvas is not None:
        raise ValueError(f"{where} is JSON, where boxes have no canvas: --layout_canvas is for LayoutGPT's text")
    content = [] if said.name == SIDECAR.name and not text.strip() else parse_json_lines(text, where)
    if not content and said.name != SIDECAR.name:
        raise ValueError(f"{where} holds an empty list: there is nothing to generate")
    found = [FoundEntry(each, f"{where}, entry {i}") for i, each in enumerate(content)]
    form = _format_of(found, said.name)
    if form is OURS:
        return found
    _log_unread(content, form, where)
    if form is SIDECAR:
        entry: Entry = {"objects": read_boxes(content, where, names)}
        return [FoundEntry(entry if sidecar_prompt is None else {"prompt": sidecar_prompt} | entry, where)]
    return _each(found, lambda each: _converted(each, form, names), on_bad)


def _each(
    found: Iterable[FoundEntry],
    convert: Callable[[FoundEntry], FoundEntry],
    on_bad: OnBad | None,
) -> list[FoundEntry]:
    converted = []
    for each in found:
        try:
            converted.append(convert(each))
        except ValueError as error:
            if on_bad is None:
                raise
            on_bad(error)
    return converted


def gligen_entry(entry: Entry, where: str) -> Entry:
    """An entry of ours as GLIGEN has it: a box goes by its phrase, or else by its label.

    Raises ValueError for what that format cannot say: scale, edit, height and width.
    """
    own: list[tuple[str, Entry]] = [(where, entry)]
    own += [(f"{where}, object {i}", item) for i, item in enumerate(entry["objects"])]
    for place, holder in own:
        for key in ("height", "width", "scale", "edit"):
            if key in holder:
                raise ValueError(f"{place}: '{key}' {short_repr(holder[key])} has no place in GLIGEN's format")
    return {
        "prompt": entry["prompt"],
        "phrases": [item.get("phrase") or item["label"] for item in entry["objects"]],
        "locations": [item["bbox"] for item in entry["objects"]],
        "alpha_type": ALWAYS_ON,
    }


def _format_of(found: Sequence[FoundEntry], name: str | None) -> LayoutFormat:
    """The one format of all entries. Raises ValueError naming the two that their keys speak for."""
    if name is not None:
        return next(each for each in JSON_FORMATS if each.name == name)
    first = _told_by_keys(found[0])
    for each in found[1:]:
        other = _told_by_keys(each)
        if other is not first:
            raise ValueError(
                f"{each.where} has the keys of {other.words}, entry 0 those of {first.words}: a file has one format"
            )
    return first


def _told_by_keys(found: FoundEntry) -> LayoutFormat:
    """Ours where no key speaks for another: its reader says best what is missing then."""
    entry = found.content if isinstance(found.content, dict) else {}
    told = _marked(entry)
    if len(told) > 1:
        (form, mark), (other, other_mark), *_ = told
        raise _undecided(found.where, f"'{mark}'", form, f"'{other_mark}'", other)
    if told:
        return told[0][0]
    if "object_list" in entry:
        raise _undecided(found.where, "'object_list'", LAYOUTGPT, "neither 'query_id' nor 'image_id'", NSR1K)
    return OURS


def _marked(entry: Entry) -> list[tuple[LayoutFormat, str]]:
    """The formats that an entry has a key of, each with the first of these keys."""
    marks = ((form, next((mark for mark in form.marks if mark in entry), None)) for form in JSON_FORMATS)
    return [(form, mark) for form, mark in marks if mark is not None]


def _undecided(where: str, key: str, form: LayoutFormat, other_key: str, other: LayoutFormat) -> ValueError:
    return ValueError(
        f"{where} may be {form.words} or {other.words}: it has {key} and {other_key}. Say which by --layout_format "
        f"{form.name} or {other.name}"
    )


def _converted(found: FoundEntry, form: LayoutFormat, names: Collection[str]) -> FoundEntry:
    """Raises ValueError for what is no entry of the format, naming the one whose keys it has."""
    entry = found.content
    if not isinstance(entry, dict):
        raise ValueError(f"{found.where}: must be an object as {form.title} has it, got {short_repr(entry)}")
    try:
        return FoundEntry(form.convert(entry, found.where, names), found.where)
    except ValueError as error:
        told = [other for other, _ in _marked(entry) if other is not form]
        if not told:
            raise
        raise ValueError(f"{error}; it was read as {form.words} and has keys of {told[0].words}") from None


def _log_unread(entries: Iterable[Any], form: LayoutFormat, where: str) -> None:
    """Says once a file which keys were not read, and that a schedule of GLIGEN's is a flag here."""
    entries = [entry for entry in entries if isinstance(entry, dict)]
    unread = sorted({key for entry in entries for key in entry} - set(form.keys))
    if unread:
        logger.info("%s: not read: %s", where, ", ".join(map(short_repr, unread)))
    alphas = [entry["alpha_type"] for entry in entries if "alpha_type" in entry] if form is GLIGEN else []
    if others := [alpha for alpha in alphas if alpha != ALWAYS_ON]:
        logger.warning(
            "%s: 'alpha_type' %s is not followed: --layout_schedule is, by the share of the picture instead of the "
            "steps", where, short_repr(others[0])
        )  # fmt: skip


def _is_text(text: str) -> bool:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return bool(lines) and (lines[0].startswith("Prompt:") or _TEXT_BOX.match(lines[0]) is not None)


def _text_entries(text: str, where: str, canvas: Size | None) -> list[FoundEntry]:
    """The scenes of LayoutGPT's text, which begin at "Prompt:", with their lines of boxes yet to be read."""
    if canvas is None:
        raise ValueError(f"{where} has boxes in pixels and says of no canvas: --layout_canvas 64x64, if it is 64 high and "
                         "64 wide")  # fmt: skip
    found: list[FoundEntry] = []
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if line.startswith("Prompt:") or (not found and line):
            found.append(FoundEntry({"objects": []}, f"{where}, entry {len(found)}"))
        if line.startswith("Prompt:"):
            found[-1].content["prompt"] = line.removeprefix("Prompt:").strip()
        elif line and line != "Layout:":
            found[-1].content["objects"].append((number, line))
    if not found:
        raise ValueError(f"{where} is empty: there is nothing to generate")
    return found


def _text_entry(found: FoundEntry, canvas: Size | None, names: Collection[str]) -> FoundEntry:
    objects = [
        _text_object(line, f"{found.where} (line {number}), object {index}", canvas, names)
        for index, (number, line) in enumerate(found.content["objects"])
    ]
    return FoundEntry(found.content | {"objects": objects}, found.where)


def _text_object(line: str, where: str, canvas: Size | None, names: Collection[str]) -> Entry:
    match = _TEXT_BOX.match(line)
    parts = [part for part in match["sides"].split(";") if part.strip()] if match else []
    sides = [_TEXT_SIDE.fullmatch(part) for part in parts]
    values = {side[1]: float(side[2]) for side in sides if side is not None}
    if match is None or len(sides) != 4 or len(values) != 4:
        raise ValueError(
            f"{where}: must be 'label {{height: 58px; width: 77px; top: 10px; left: 20px; }}', got {short_repr(line)}"
        )
    label, numbers = match["label"], [values[side] for side in ("left", "top", "width", "height")]
    box = read_box(numbers, f"{where} ({short_repr(label)})", "left, top, width, height", _PX, ("LayoutGPT", ""), canvas)
    return {"label": category_name(label, names), "bbox": box}
