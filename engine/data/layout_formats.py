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

import json
import logging
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.box_readings import BoxReading, read_box
from engine.data.layout_entries import (
    GLIGEN,
    JSON_FORMATS,
    LAYOUTGPT,
    NSR1K,
    OURS,
    SIDECAR,
    Entry,
    LayoutFormat,
    category_name,
    from_sidecar,
)
from util.buckets import Size
from util.read import parse_json, read_text, short_path, short_repr

logger = logging.getLogger(__name__)

SIDECAR_SUFFIX = ".bbox"
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
    on_bad: Callable[[ValueError], None] | None = None,
) -> list[FoundEntry]:
    """The entries of a layout file in any of the formats; those of ours are not checked any further.

    names: of categories, which labels of other formats may mean. is_prompt_given: whoever asks has a prompt, so that
    the .txt beside a .bbox file is not looked for. on_bad: gets the error of an entry of another format that is wrong,
    which is left out then. Raises FileNotFoundError or ValueError.
    """
    said, where = said or FileFormat(), f"layout file {short_path(path)}"
    text = read_text(path, "layout file")
    if Path(path).suffix == SIDECAR_SUFFIX and not text.strip():
        return [_sidecar_entry(Path(path), where, [], names, is_prompt_given)]

    def beside_caption(content: list[Any]) -> FoundEntry:
        return _sidecar_entry(Path(path), where, content, names, is_prompt_given)

    return parse_entries(text, where, said, names, on_bad, beside_caption)


def parse_entries(
    text: str,
    where: str,
    said: FileFormat | None = None,
    names: Collection[str] = (),
    on_bad: Callable[[ValueError], None] | None = None,
    sidecar: Callable[[list[Any]], FoundEntry] | None = None,
) -> list[FoundEntry]:
    """`read_entries` of a text that is there already; errors begin with `where`. sidecar: makes the one entry of a .bbox
    file's content; by default it has an empty prompt."""
    said = said or FileFormat()
    if said.name == TEXT or (said.name is None and _is_text(text)):
        return _each(
            _text_entries(text, where, said.canvas), lambda each: _text_entry(each, said.canvas, names), on_bad
        )
    if said.canvas is not None:
        raise ValueError(f"{where} is JSON, where boxes have no canvas: --layout_canvas is for LayoutGPT's text")
    content = _parse(text, where)
    if not content:
        raise ValueError(f"{where} holds an empty list: there is nothing to generate")
    found = [FoundEntry(each, f"{where}, entry {i}") for i, each in enumerate(content)]
    form = _format_of(found, said.name)
    if form is SIDECAR and sidecar is not None:
        return [sidecar(content)]
    if form is SIDECAR:
        return [FoundEntry({"prompt": "", "objects": from_sidecar(content, where, names)}, where)]
    if form is OURS:
        return found
    _log_unread(content, form, where)
    return _each(found, lambda each: _converted(each, form, names), on_bad)


def _each(
    found: Iterable[FoundEntry],
    convert: Callable[[FoundEntry], FoundEntry],
    on_bad: Callable[[ValueError], None] | None,
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


def read_sidecar(path: str | Path, names: Collection[str] = ()) -> list[Entry]:
    """The objects of a .bbox file: label, bbox and what else ours may have."""
    where = f"sidecar {short_path(path)}"
    text = read_text(path, "sidecar")
    content = _parse(text, where) if text.strip() else []
    objects = from_sidecar(content, where, names)
    _log_unread(content, SIDECAR, where, logging.DEBUG)
    return objects


def read_captions(path: str | Path) -> list[str]:
    """The captions of a .txt file, one a line, with single spaces; blank lines are none."""
    lines = (" ".join(line.split()) for line in read_text(path, "caption file").splitlines())
    return [line for line in lines if line]


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


def _parse(text: str, where: str) -> list[Any]:
    """JSON, or JSON lines, as the list of what it holds."""
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and all(_is_whole(line) for line in lines):
        return [parse_json(line, f"{where}, line {number}") for number, line in enumerate(lines, start=1)]
    content = parse_json(text, where)
    return content if isinstance(content, list) else [content]


def _is_whole(line: str) -> bool:
    """Whether a line is a JSON object of its own."""
    return line.lstrip().startswith("{") and line.rstrip().endswith("}") and _loads(line)


def _loads(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


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


def _sidecar_entry(
    path: Path, where: str, content: list[Any], names: Collection[str], is_prompt_given: bool
) -> FoundEntry:
    """All objects of a .bbox file, with the first caption of the .txt file beside it."""
    objects, caption_file = from_sidecar(content, where, names), path.with_suffix(".txt")
    _log_unread(content, SIDECAR, where)
    entry: Entry = {"objects": objects}
    if not is_prompt_given and caption_file.is_file():
        captions = read_captions(caption_file)
        if not captions:
            raise ValueError(f"caption file {short_path(caption_file)} is blank: it is to say the prompt of {where}")
        entry["prompt"] = captions[0]
    return FoundEntry(entry, where)


def _log_unread(entries: Iterable[Any], form: LayoutFormat, where: str, level: int = logging.INFO) -> None:
    """Says once a file which keys were not read, and that a schedule of GLIGEN's is a flag here."""
    entries = [entry for entry in entries if isinstance(entry, dict)]
    unread = sorted({key for entry in entries for key in entry} - set(form.keys))
    if unread:
        logger.log(level, "%s: not read: %s", where, ", ".join(map(short_repr, unread)))
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
