"""The door through which users' text files come in: regular UTF-8 files, strict JSON, one line for every mistake.

JSON is read as RFC 8259 has it, with two differences that callers rely on: a key that is there twice is refused, and
NaN and Infinity are passed on (Python writes them), so that the reader of the field can name it when it refuses them.
"""

from __future__ import annotations

import json
import os
import reprlib
import stat
from pathlib import Path
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 3, 8, 8, 8
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 100, 60, 40
_SHORT_LIMIT = 240


def short_repr(value: Any) -> str:
    """A value of a file for an error: on one line, at most 240 characters, control characters escaped."""
    text = _SHORT.repr(value)
    return text if len(text) <= _SHORT_LIMIT else text[:_SHORT_LIMIT] + "..."


def short_path(path: str | Path) -> str:
    """A path for an error: control characters escaped, quotes only where there are some."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def require_regular_file(path: str | Path, what: str) -> os.stat_result:
    """Raises FileNotFoundError where nothing or a folder has the name, ValueError for what cannot be read as a file: a
    pipe (opening it would wait for ever), a loop of links, no permission to look."""
    name = f"{what} {short_path(path)}"
    try:
        found = os.stat(path)
    except FileNotFoundError:
        is_link = os.path.islink(path)
        raise FileNotFoundError(f"{name} does not exist" + (": the link leads nowhere" if is_link else "")) from None
    except (OSError, ValueError) as error:  # ValueError: NUL, or text that is no file name
        raise ValueError(f"{name} cannot be read: {_reason(error)}") from error
    if stat.S_ISDIR(found.st_mode):
        raise FileNotFoundError(f"{name} does not exist: there is a folder of that name")
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{name} is not a regular file but a pipe, a socket or a device")
    return found


def read_bytes(path: str | Path, what: str) -> bytes:
    """The content of a regular file. Raises FileNotFoundError or ValueError, naming the file."""
    require_regular_file(path, what)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{what} {short_path(path)} cannot be read: {_reason(error)}") from error


def read_text(path: str | Path, what: str) -> str:
    """The content of a UTF-8 file without byte order mark. Raises FileNotFoundError or ValueError, naming the file."""
    content, name = read_bytes(path, what), f"{what} {short_path(path)}"
    if content.startswith(b"\xef\xbb\xbf"):
        raise ValueError(f"{name} begins with a byte order mark (BOM): save it as UTF-8 without BOM")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        hint = ", it looks like UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        byte = f"byte 0x{content[error.start]:02x} at position {error.start}"
        raise ValueError(f"{name} is not UTF-8 text ({byte}{hint})") from error


def read_json(path: str | Path, what: str) -> Any:
    """The content of a JSON file; `what` the file is begins each message: "layout file". Raises FileNotFoundError for a
    missing file, ValueError for anything that is not JSON in UTF-8 with every key once."""
    return parse_json(read_text(path, what), f"{what} {short_path(path)}")


def parse_json(text: str, name: str) -> Any:
    """`read_json` of a text that is there already; `name` begins each message. Raises ValueError."""
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except _RepeatedKeyError as error:
        raise ValueError(f"{name}: key {short_repr(error.key)} is there twice in one object") from None
    except json.JSONDecodeError as error:
        empty = " (the file is empty)" if not text.strip() else ""
        raise ValueError(f"{name} is not valid JSON: {error}{empty}") from error
    except RecursionError:
        raise ValueError(f"{name} is not usable JSON: it is nested too deeply") from None
    except ValueError as error:  # of int(): more digits than it takes
        raise ValueError(f"{name} is not usable JSON: a number is too long ({error})") from error


def parse_json_lines(text: str, name: str) -> list[Any]:
    """JSON lines, or JSON, as the list of what it holds; `name` begins each message. Raises ValueError."""
    lines = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if len(lines) > 1 and all(_is_object(line) for _, line in lines):
        return [parse_json(line, f"{name}, line {number}") for number, line in lines]
    content = parse_json(text, name)
    return content if isinstance(content, list) else [content]


def _is_object(line: str) -> bool:
    """Whether a line looks like a JSON object of its own."""
    line = line.strip()
    return line.startswith("{") and line.endswith("}")


def require_text(value: Any, where: str) -> str:
    """`value` if it is a string that can be encoded. Raises ValueError that begins with `where`."""
    if not isinstance(value, str):
        raise ValueError(f"{where} must be a string, got {short_repr(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        around = value[max(0, error.start - 20) : error.end + 20]
        raise ValueError(
            f"{where} is no text: it has a lone surrogate, half of a character, at position {error.start} of "
            f"{short_repr(around)}"
        ) from None
    return value


class _RepeatedKeyError(Exception):
    def __init__(self, key: str) -> None:
        self.key = key


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RepeatedKeyError(key)
            seen.add(key)
    return values


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
