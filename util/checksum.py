"""Checksums inside files of weights, so that a flipped bit is an error and not another model.

`.pth` (a zip archive): CRC-32 over the whole file but its last bytes, in the archive's comment. Files without one (of
PyTorch alone) have the zip's own CRC-32 of each record, which `torch.load` does not look at.
`.safetensors`: CRC-32 of each tensor, and of the rest of the metadata, in the metadata.
One pass over the file, about a second per gigabyte.
"""

from __future__ import annotations

import json
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

KIND = "crc32"
KIND_KEY, VALUES_KEY = "checksum", "checksums"  # in the metadata of a `.safetensors`
_COMMENT = b"%s %%08x" % KIND.encode()
_COMMENT_LENGTH = len(_COMMENT % 0)
_CHUNK = 1 << 22


# --- zip archives ----------------------------------------------------------------------------------------------------


def write_with_checksum(file: IO[bytes], write: Callable[[Any], Any]) -> None:
    """`write` writes a zip archive without a comment to the file it is given; `file` gets it with its checksum."""
    summed = _SummedFile(file)
    write(summed)
    assert summed.held_back == b"\0\0", "a zip archive without a comment ends with the comment's length"
    file.write(struct.pack("<H", _COMMENT_LENGTH) + _COMMENT % summed.crc)


def damaged_records(path: Path) -> list[str] | None:
    """The records of a zip archive whose bytes are not those that were written; [] where only its index or padding is
    damaged; None if it is whole. Raises zipfile.BadZipFile if it is no archive any more."""
    stated = _stated_checksum(path)
    if stated is not None and stated == _crc_of(path, path.stat().st_size - _COMMENT_LENGTH - 2):
        return None
    with zipfile.ZipFile(path) as archive:
        damaged = [record.filename for record in archive.infolist() if not _is_whole(archive, record)]
    return damaged if damaged or stated is not None else None


class _SummedFile:
    """Passes all but the last two bytes on, and sums up what it passes on."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.crc = 0
        self.held_back = b""

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if len(view) < 2:
            view = memoryview(self.held_back + bytes(view))
        else:
            self._pass_on(self.held_back)
        self._pass_on(view[:-2])
        self.held_back = bytes(view[-2:])
        return len(memoryview(data).cast("B"))

    def flush(self) -> None:
        self.file.flush()

    def _pass_on(self, data: Any) -> None:
        self.crc = zlib.crc32(data, self.crc)
        self.file.write(data)


def _stated_checksum(path: Path) -> int | None:
    """None without one; -1, which never fits, for a comment of our length that is not ours."""
    size = _COMMENT_LENGTH + 2
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - size - 20))
        end = file.read()
    if len(end) < size + 20 or end[:4] != b"PK\x05\x06":  # the archive's end record starts elsewhere
        return None
    found = re.fullmatch(rb"%s%s ([0-9a-f]{8})" % (struct.pack("<H", _COMMENT_LENGTH), KIND.encode()), end[20:])
    return int(found[1], 16) if found else -1


def _crc_of(path: Path, length: int) -> int:
    crc, left = 0, length
    with open(path, "rb", buffering=0) as file:
        while left > 0 and (chunk := file.read(min(_CHUNK, left))):
            crc, left = zlib.crc32(chunk, crc), left - len(chunk)
    return crc


def _is_whole(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> bool:
    try:
        with archive.open(record) as opened:
            while opened.read(_CHUNK):
                pass
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError):
        return False
    return True


# --- named tensors ---------------------------------------------------------------------------------------------------


def checksum_metadata(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """What goes into the header besides `metadata`: checksums of both. tensors: contiguous, on the CPU."""
    stated = {**metadata, KIND_KEY: KIND}
    sums = {"": _crc_of_text(stated), **{name: _crc_of_tensor(tensor) for name, tensor in tensors.items()}}
    return {KIND_KEY: KIND, VALUES_KEY: json.dumps(sums, sort_keys=True, separators=(",", ":"))}


def without_checksums(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key not in (KIND_KEY, VALUES_KEY)}


def damaged_tensor(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str | None:
    """What is not as it was written: a tensor's name, or the metadata; None if all is, or nothing is stated."""
    if KIND_KEY not in metadata and VALUES_KEY not in metadata:
        return None
    try:
        stated = json.loads(metadata.get(VALUES_KEY, ""))
    except ValueError:
        return "the metadata"
    if not isinstance(stated, dict) or stated.get("") != _crc_of_text(
        {key: value for key, value in metadata.items() if key != VALUES_KEY}
    ):
        return "the metadata"
    for name in sorted({*tensors, *stated} - {""}):
        if name not in tensors or stated.get(name) != _crc_of_tensor(tensors[name]):
            return name
    return None


def _crc_of_text(metadata: Mapping[str, str]) -> int:
    return zlib.crc32(json.dumps(metadata, sort_keys=True).encode())


def _crc_of_tensor(tensor: Tensor) -> int:
    crc = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
