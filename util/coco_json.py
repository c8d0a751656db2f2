"""The entries of COCO's jsons. Types are checked here, once; whoever gets the entries may trust them.

    numbers      JSON numbers. A whole one may be written 3 or 3.0; "3", true and 3.5 are refused
    ids          whole numbers of 64 bits, each once in its list
    width, height  whole numbers of at least 1
    bbox         four finite numbers: x, y, width, height
    iscrowd      0 or 1 (or false, true); 0 where it is missing
    file_name    a relative path that stays below the split's folder
    name, caption, phrase  text that can be written as UTF-8. phrase: what a box holds in words; "" where it is missing
    categories   one name each. A second one of a name is left out if only one of them has boxes: exports write such
                 roots; else it is refused

Nothing else is read: area, segmentation, supercategory and unknown fields may be missing or anything.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from util.read import read_json, require_text, short_path, short_repr
from util.types import Category

logger = logging.getLogger(__name__)

_INT64 = range(-(2**63), 2**63)
_SIDES = range(1, 2**31)
_SINGULAR = {"images": "image", "annotations": "annotation", "categories": "category"}


class ImageEntry(NamedTuple):
    id: int
    file_name: str
    width: int
    height: int


class BoxEntry(NamedTuple):
    """category_id: None where a phrase alone says what the box holds, which no json has. bbox: x, y, width, height in
    pixels; may be degenerate or reach out of the image. phrase: with single spaces, none around it."""

    id: int
    image_id: int
    category_id: int | None
    bbox: tuple[float, float, float, float]
    is_crowd: bool
    phrase: str = ""


class CaptionEntry(NamedTuple):
    """text: with single spaces, none around it."""

    id: int
    image_id: int
    text: str


@dataclass(frozen=True)
class Instances:
    """An instances json. categories: sorted by id. boxes: those of unlisted images too; the others have a category."""

    images: list[ImageEntry]
    boxes: list[BoxEntry]
    categories: tuple[Category, ...]


def read_instances(path: Path) -> Instances:
    """Raises FileNotFoundError, or ValueError naming the file, the entry, the field and the value that are wrong."""
    content = _read(path, ("images", "annotations", "categories"))
    images = _entries(path, content, "images", _image)
    boxes = _entries(path, content, "annotations", _box)
    categories = _entries(path, content, "categories", _category)
    categories = _with_distinct_names(categories, {box.category_id for box in boxes}, path)
    listed, known = {image.id for image in images}, {category.id for category in categories}
    for position, box in enumerate(boxes):
        if box.category_id not in known and box.image_id in listed:
            where = _where(path, "annotations", position, box.id)
            raise ValueError(f"{where}: category_id {box.category_id} is none of the {len(known)} ids in 'categories'")
    return Instances(images, boxes, tuple(sorted(categories, key=lambda each: each.id)))


def read_categories(path: Path) -> tuple[Category, ...]:
    """The categories alone, sorted by id, of any json that lists them. Raises as `read_instances` does."""
    categories = _entries(path, _read(path, ("categories",)), "categories", _category)
    return tuple(sorted(_with_distinct_names(categories, (), path), key=lambda each: each.id))


def read_captions(path: Path) -> list[CaptionEntry]:
    """The captions in the order of their ids. Raises as `read_instances` does."""
    entries = _entries(path, _read(path, ("annotations",)), "annotations", _caption)
    return sorted(entries, key=lambda each: each.id)


def _read(path: Path, lists: Sequence[str]) -> dict[str, Any]:
    content = read_json(path, "annotation file")
    if not isinstance(content, dict):
        raise ValueError(f"{short_path(path)} must hold an object with {list(lists)}, got a {type(content).__name__}")
    for name in lists:
        if not isinstance(content.get(name), list):
            raise ValueError(f"{short_path(path)} has no list {name!r}; it holds {short_repr(sorted(content))}")
    return content


Entry = TypeVar("Entry", ImageEntry, BoxEntry, CaptionEntry, Category)


def _entries(path: Path, content: dict[str, Any], name: str, convert: Callable[[dict[str, Any]], Entry]) -> list[Entry]:
    """Every entry of a list, converted; their ids are distinct."""
    converted: list[Entry] = []
    for position, entry in enumerate(content[name]):
        try:
            if not isinstance(entry, dict):
                raise ValueError(f"must be an object, got {short_repr(entry)}")
            converted.append(convert(entry))
        except ValueError as error:
            named = entry.get("id") if isinstance(entry, dict) else None
            raise ValueError(f"{_where(path, name, position, named)}: {error}") from None
    counts = Counter(entry.id for entry in converted)
    if len(counts) < len(converted):
        repeated = next(each for each, count in counts.items() if count > 1)
        raise ValueError(f"{short_path(path)}: {name}: id {repeated} occurs more than once")
    return converted


def _where(path: Path, name: str, position: int, entry_id: Any) -> str:
    named = "" if entry_id is None else f" ({_SINGULAR[name]} {short_repr(entry_id)})"
    return f"{short_path(path)}: {name}[{position}]{named}"


def _image(entry: dict[str, Any]) -> ImageEntry:
    width, height = _whole(entry, "width"), _whole(entry, "height")
    if width not in _SIDES or height not in _SIDES:
        raise ValueError(f"width and height must be at least 1, the size is {short_repr(width)}x{short_repr(height)}")
    return ImageEntry(_whole(entry, "id"), _file_name(entry), width, height)


def _box(entry: dict[str, Any]) -> BoxEntry:
    crowd = entry.get("iscrowd", 0)
    if not isinstance(crowd, int | float) or crowd not in (0, 1):
        raise ValueError(f"iscrowd must be 0 or 1, got {short_repr(crowd)}")
    ids = _whole(entry, "id"), _whole(entry, "image_id"), _whole(entry, "category_id")
    return BoxEntry(*ids, _bbox(_field(entry, "bbox")), bool(crowd), _text(entry.get("phrase", ""), "phrase"))


def _category(entry: dict[str, Any]) -> Category:
    name = require_text(_field(entry, "name"), "name")
    if not name.strip():
        raise ValueError(f"name must not be empty, got {short_repr(name)}")
    return Category(_whole(entry, "id"), name)


def _caption(entry: dict[str, Any]) -> CaptionEntry:
    text = _text(_field(entry, "caption"), "caption")
    return CaptionEntry(_whole(entry, "id"), _whole(entry, "image_id"), text)


def _text(value: Any, field: str) -> str:
    """With single spaces, none around it."""
    return " ".join(require_text(value, field).split())


def _field(entry: dict[str, Any], name: str) -> Any:
    if name not in entry:
        raise ValueError(f"{name!r} is missing; it has {short_repr(sorted(entry))}")
    return entry[name]


def _whole(entry: dict[str, Any], name: str) -> int:
    value = _field(entry, name)
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int or value not in _INT64:
        raise ValueError(f"{name} must be a whole number of 64 bits, got {short_repr(value)}")
    return value


def _bbox(box: Any) -> tuple[float, float, float, float]:
    if isinstance(box, list) and len(box) == 4 and all(type(value) in (int, float) for value in box):
        try:
            x, y, width, height = map(float, box)
        except OverflowError:  # an integer of more than 308 digits
            x = y = width = height = math.inf
        if math.isfinite(x) and math.isfinite(y) and math.isfinite(width) and math.isfinite(height):
            return x, y, width, height
    raise ValueError(f"bbox must be four finite numbers [x, y, width, height], got {short_repr(box)}")


def _file_name(entry: dict[str, Any]) -> str:
    name = require_text(_field(entry, "file_name"), "file_name")
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(f"file_name must be a relative path below the split's folder, got {short_repr(name)}")
    return name


def _with_distinct_names(categories: list[Category], used: Collection[int | None], path: Path) -> list[Category]:
    ids_of: dict[str, list[int]] = {}
    for category in categories:
        ids_of.setdefault(category.name, []).append(category.id)
    left_out: set[int] = set()
    for name, ids in ids_of.items():
        if len(ids) == 1:
            continue
        with_boxes = [each for each in ids if each in used]
        if len(with_boxes) != 1:
            having = "several have boxes" if with_boxes else "none has boxes"
            raise ValueError(f"{short_path(path)}: categories: the name {short_repr(name)} belongs to the ids "
                             f"{short_repr(ids)}, and {having}: give each category a name of its own")  # fmt: skip
        left_out.update(set(ids) - set(with_boxes))
    if left_out:
        logger.info("%s: left out categories %s: they repeat names and have no box", path, sorted(left_out))
    return [category for category in categories if category.id not in left_out]
