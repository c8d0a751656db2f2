"""The door of text files: what is accepted, and the one line that every other kind of file gets."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from util.read import read_json, require_text, short_repr


def test_values_come_back(tmp_path):
    path = tmp_path / "a.json"
    content = {"a": [1, 2.5, None, True, "犬 🐕"], "b": {"a": {}}}
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    assert read_json(path, "file") == content


DEEP = "[" * 100_000
BAD = {
    "empty": (b"", r"is not valid JSON: .* \(the file is empty\)"),
    "cut off": (b'{"a": [1, 2', "is not valid JSON: .*line 1 column 12"),
    "two values": (b"{} {}", "is not valid JSON: Extra data"),
    "BOM": (b"\xef\xbb\xbf{}", r"begins with a byte order mark \(BOM\)"),
    "UTF-16": ("{}".encode("utf-16"), "is not UTF-8 text .*looks like UTF-16"),
    "Latin-1": ('"café"'.encode("latin-1"), "is not UTF-8 text .*byte 0xe9 at position 4"),
    "random bytes": (bytes(range(256)) * 100, "is not UTF-8 text"),
    "repeated key": (b'{"a": {"b": 1, "c": 2, "b": 3}}', "key 'b' is there twice in one object"),
    "repeated key with an escape": (b'{"\\u001b[2J": 1, "\\u001b[2J": 3}', r"key '\\x1b\[2J' is there twice"),
    "deep list": (DEEP.encode(), "nested too deeply"),
    "deep object": (b'{"a":' * 100_000, "nested too deeply"),
    "5000 digits": (b"1" * 5000, "a number is too long"),
    "NUL": (b'{"a": 1}\x00', "is not valid JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_json_is_named_in_one_line(tmp_path, case):
    content, message = BAD[case]
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_json(path, "layout file")
    said = str(error.value)
    assert said.startswith(f"layout file {path}") and said.isprintable() and len(said) < 400


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (Path.mkdir, "does not exist: there is a folder of that name"),
        (os.mkfifo, "is not a regular file"),
        (make_loop, "cannot be read: Too many levels"),
        (lambda path: path.symlink_to("nowhere"), "the link leads nowhere"),
    ],
)
def test_what_is_no_file_is_named_in_one_line(tmp_path, make, message):
    path = tmp_path / "a.json"
    make(path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        read_json(path, "layout file")
    assert str(error.value).startswith(f"layout file {path}")


@pytest.mark.parametrize("path", ["a\0b.json", "x" * 5000])
def test_impossible_names(path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_json(path, "layout file")


def test_someone_elses_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("{}")

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read everything
    with pytest.raises(ValueError, match=r"layout file .*a\.json cannot be read: Permission denied"):
        read_json(path, "layout file")


def test_texts():
    assert require_text("犬 \0 \x07", "caption") == "犬 \0 \x07"
    with pytest.raises(ValueError, match="caption must be a string, got 5"):
        require_text(5, "caption")
    with pytest.raises(ValueError, match=r"caption is no text: .*lone surrogate.* at position 2 of 'a \\ud83d dog'"):
        require_text("a \ud83d dog", "caption")


@pytest.mark.parametrize(
    "value", ["x" * 10**6, "\x1b[2J\x07\n", [[[[[1]]]]], [0] * 10**5, {"k" * 1000: 1}, 10**400, "\ud800", float("nan")]
)
def test_values_are_shown_short_and_on_one_line(value):
    shown = short_repr(value)
    assert shown.isprintable() and len(shown) <= 243


def test_a_value_nested_as_deep_as_json_allows_can_be_shown():
    value: list[object] = []
    for _ in range(10_000):
        value = [value]
    assert short_repr(value) == "[[[[...]]]]"
