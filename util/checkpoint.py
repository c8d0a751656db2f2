"""Checkpoint files: written atomically, read without executing anything, refused with one clear line.

A checkpoint is a dictionary of plain values (numbers, strings, lists, dictionaries) and tensors, so that it loads under
`torch.load(weights_only=True)`. Weights alone may also be `.safetensors`. What the entries mean is not decided here.
Equal contents are equal bytes (util/canonical.py), and files carry checksums (util/checksum.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from util.canonical import MAX_DEPTH, canonical
from util.checksum import (
    checksum_metadata,
    damaged_records,
    damaged_tensor,
    without_checksums,
    write_with_checksum,
)
from util.names import LAST_NAME
from util.output import write_atomic
from util.weights import tensor_problem

_UNREADABLE = (
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RecursionError,
    MemoryError,
    OverflowError,
    struct.error,
)


def save_atomic(obj: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes `obj` to `path` so that, whenever the process dies, `path` holds the old content or the new, never a part.

    The bytes go to `path` + ".tmp", reach the disk, and the file is renamed. Missing folders are made.
    Raises ValueError naming the entry if something in `obj` is neither a tensor nor a plain value (it would not load).
    """
    content = canonical(obj)
    write_atomic(Path(path), lambda file: write_with_checksum(file, lambda summed: torch.save(content, summed)))


def save_safetensors_atomic(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Like `save_atomic`, for named tensors in the safetensors format (contiguous copies, on the CPU)."""
    payload = canonical(dict(tensors))
    stated = dict(metadata or {})
    content = memoryview(safetensors.torch.save(payload, metadata=stated | checksum_metadata(payload, stated)))
    (length,) = struct.unpack("<Q", content[:8])
    header = _sorted_header(bytes(content[8 : 8 + length]))
    write_atomic(Path(path), lambda file: file.writelines([header, content[8 + length :]]))


def _sorted_header(header: bytes) -> bytes:
    """With its length before it. The library writes metadata in another order each time."""
    entries = json.loads(header)
    metadata = entries.pop("__metadata__", {})
    text = json.dumps({"__metadata__": dict(sorted(metadata.items())), **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def load_plain(
    path: str | os.PathLike[str],
    map_location: torch.device | str = "cpu",
    mmap: bool = False,
    is_trusted: bool = False,
) -> dict[str, Any]:
    """The dictionary in a `.pth`, `.pt`, `.ckpt` or `.safetensors` file, or in a folder's `checkpoint-last.pth`.

    `argparse.Namespace` entries (MAR's checkpoints have one) become dictionaries. `mmap` leaves the tensors of a CPU
    load on disk until they are read. is_trusted: leave out the checksums, where the file is about to be read in full by
    another call.
    Raises FileNotFoundError or ValueError, one line naming the file, for anything but a whole, plain checkpoint.
    """
    file = resolve_checkpoint(path)
    _refuse_obvious(file)
    if file.suffix == ".safetensors":
        return _load_safetensors(file, map_location)
    if not is_trusted and _is_zip(file):
        _refuse_damaged(file)
    loaded = _load_pickle(file, map_location, mmap)
    if isinstance(loaded, argparse.Namespace) or not isinstance(loaded, dict):
        raise ValueError(f"{file} holds a {type(loaded).__name__}, a checkpoint is a dictionary")
    return _without_namespaces(loaded, file)


def safetensors_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The header's metadata of a `.safetensors` file ({} if it has none). Same errors as `load_plain`."""
    file = resolve_checkpoint(path)
    _refuse_obvious(file)
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            return without_checksums(opened.metadata() or {})
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is truncated or not a safetensors file ({_one_line(error)})") from error


def resolve_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The file meant by `path`: itself or, as in MAR's --resume, `checkpoint-last.pth` in it if it is a folder."""
    file = Path(path)
    if file.is_dir():
        if not (file / LAST_NAME).is_file():
            raise FileNotFoundError(f"{file} is a folder without {LAST_NAME}")
        return file / LAST_NAME
    if file.is_symlink() and not file.exists():
        raise FileNotFoundError(f"{file} is a link to {os.readlink(file)}, which does not exist")
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    return file


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The file's SHA-256, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values, by name: the same for equal weights, whatever file they are in."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _refuse_obvious(file: Path) -> None:
    """Names the usual accidents before a parser stumbles over them."""
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty (an interrupted download or a full disk)")
    with open(file, "rb") as opened:
        head = opened.read(512)
    if re.match(rb"\s*<(!doctype|html|\?xml|head)", head, re.IGNORECASE):
        raise ValueError(f"{file} is a web page, not weights: the download returned HTML, get the file again")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file} is a Git LFS pointer, not weights: run `git lfs pull` to get the file itself")
    if head.startswith(b"PK\x03\x04") and not _is_zip(file):
        size = file.stat().st_size
        raise ValueError(
            f"{file} is truncated or damaged (its index is missing after {size} bytes): get or write it again"
        )


def _is_zip(file: Path) -> bool:
    try:
        return zipfile.is_zipfile(file)
    except zipfile.BadZipFile:
        return False


def _refuse_damaged(file: Path) -> None:
    try:
        records = damaged_records(file)
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError, struct.error) as error:
        raise ValueError(f"{file} is damaged ({_one_line(error)})") from error
    if records is not None:
        names = _entries_of(file, records) or records or ["its index"]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(f"{file} is damaged: {', '.join(names[:3])}{more} is not what was written, by its checksum")


def _entries_of(file: Path, records: Sequence[str]) -> list[str]:
    """Where in the file's dictionary the tensors of some records stand; [] where the dictionary is damaged itself."""
    numbers = {int(found[1]) for found in (re.search(r"/data/(\d+)$", record) for record in records) if found}
    if len(numbers) < len(records):
        return []
    try:
        loaded = _load_pickle(file, "cpu", mmap=True)
    except ValueError:
        return []
    storages: dict[int, int] = {}  # in the order in which they were pickled, which numbers them
    names = []
    for where, tensor in _tensors(loaded, ""):
        number = storages.setdefault(tensor.untyped_storage().data_ptr(), len(storages))
        if number in numbers:
            names.append(where)
    return names


def _tensors(value: Any, where: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield where, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _tensors(entry, f"{where}/{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            yield from _tensors(entry, f"{where}/{index}")


def _load_safetensors(file: Path, map_location: torch.device | str) -> dict[str, Any]:
    try:
        tensors = safetensors.torch.load_file(file)
        with safetensors.safe_open(file, framework="pt") as opened:
            damaged = damaged_tensor(tensors, opened.metadata() or {})
        if damaged is not None:
            odd = tensor_problem(damaged, tensors[damaged]) if damaged in tensors else None
            why = f" ({odd})" if odd else ""
            raise ValueError(
                f"{file} is damaged: {damaged} is not what was written, by its checksum{why}; what was changed on "
                "purpose is saved without the checksums in the metadata"
            )
        return {name: tensor.to(map_location) for name, tensor in tensors.items()}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is truncated or not a safetensors file ({_one_line(error)})") from error


def _load_pickle(file: Path, map_location: torch.device | str, mmap: bool) -> Any:
    use_mmap = mmap and _is_zip(file)  # the format before torch 1.6 cannot be mapped
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location=map_location, weights_only=True, mmap=use_mmap)
    except torch.OutOfMemoryError:
        raise
    except _UNREADABLE as error:
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        if foreign:
            raise ValueError(f"{file} holds a {foreign[1]}, neither a tensor nor a plain value: refused") from error
        raise ValueError(f"{file} is truncated or not a checkpoint ({_one_line(error)})") from error


def _without_namespaces(value: Any, file: Path, depth: int = 0) -> Any:
    """Raises ValueError naming the file where dictionaries lie in one another without end."""
    if depth > MAX_DEPTH:
        raise ValueError(f"{file} holds dictionaries in one another, more than {MAX_DEPTH} deep")
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return {key: _without_namespaces(entry, file, depth + 1) for key, entry in value.items()}
    return value


def _one_line(error: BaseException) -> str:
    _, _, reason = str(error).partition("WeightsUnpickler error: ")  # amid advice to load what is not plain
    text = " ".join((reason.partition("\n")[0] or str(error)).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
