"""Checkpoint files: written atomically, read without executing anything, refused with one clear line.

A checkpoint is a dictionary of plain values (numbers, strings, lists, dictionaries) and tensors, so that it loads under
`torch.load(weights_only=True)`. Weights alone may also be `.safetensors`. What the entries mean is not decided here.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from util.output import write_atomic

LAST_NAME = "checkpoint-last.pth"
_PLAIN_LEAVES = (type(None), bool, int, float, str, bytes, Tensor, torch.nn.Parameter)
_UNREADABLE = (
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    struct.error,
)


def save_atomic(obj: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes `obj` to `path` so that, whenever the process dies, `path` holds the old content or the new, never a part.

    The bytes go to `path` + ".tmp", reach the disk, and the file is renamed. Missing folders are made.
    Raises ValueError naming the entry if something in `obj` is neither a tensor nor a plain value (it would not load).
    """
    _check_plain(obj, "checkpoint")
    write_atomic(Path(path), lambda file: torch.save(obj, file))


def save_safetensors_atomic(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Like `save_atomic`, for named tensors in the safetensors format (contiguous copies, on the CPU)."""
    payload = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = safetensors.torch.save(payload, metadata=dict(metadata or {}))
    write_atomic(Path(path), lambda file: file.write(content))


def load_plain(
    path: str | os.PathLike[str], map_location: torch.device | str = "cpu", mmap: bool = False
) -> dict[str, Any]:
    """The dictionary in a `.pth`, `.pt`, `.ckpt` or `.safetensors` file, or in a folder's `checkpoint-last.pth`.

    `argparse.Namespace` entries (MAR's checkpoints have one) become dictionaries. `mmap` leaves the tensors of a CPU
    load on disk until they are read (checksums are then not verified).
    Raises FileNotFoundError or ValueError, one line naming the file, for anything but a whole, plain checkpoint.
    """
    file = resolve_checkpoint(path)
    _refuse_obvious(file)
    if file.suffix == ".safetensors":
        return _load_safetensors(file, map_location)
    loaded = _load_pickle(file, map_location, mmap)
    if isinstance(loaded, argparse.Namespace) or not isinstance(loaded, dict):
        raise ValueError(f"{file} holds a {type(loaded).__name__}, a checkpoint is a dictionary")
    return _without_namespaces(loaded)


def safetensors_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The header's metadata of a `.safetensors` file ({} if it has none). Same errors as `load_plain`."""
    file = resolve_checkpoint(path)
    _refuse_obvious(file)
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            return dict(opened.metadata() or {})
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is truncated or not a safetensors file ({_one_line(error)})") from error


def resolve_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The file meant by `path`: itself or, as in MAR's --resume, `checkpoint-last.pth` in it if it is a folder."""
    file = Path(path)
    if file.is_dir():
        if not (file / LAST_NAME).is_file():
            raise FileNotFoundError(f"{file} is a folder without {LAST_NAME}")
        return file / LAST_NAME
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


def _check_plain(value: Any, where: str) -> None:
    if type(value) in (dict, OrderedDict):
        for key, entry in value.items():
            if type(key) not in (str, int):
                raise ValueError(f"{where}: key {key!r} is a {type(key).__name__}, checkpoints hold plain values only")
            _check_plain(entry, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, entry in enumerate(value):
            _check_plain(entry, f"{where}[{index}]")
    elif type(value) not in _PLAIN_LEAVES:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise ValueError(f"{where} is a {kind}, checkpoints hold plain values and tensors only")


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
    if head.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(file):
        size = file.stat().st_size
        raise ValueError(f"{file} is truncated (its index is missing after {size} bytes): get or write it again")


def _load_safetensors(file: Path, map_location: torch.device | str) -> dict[str, Any]:
    try:
        return dict(safetensors.torch.load_file(file, device=str(map_location)))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is truncated or not a safetensors file ({_one_line(error)})") from error


def _load_pickle(file: Path, map_location: torch.device | str, mmap: bool) -> Any:
    use_mmap = mmap and zipfile.is_zipfile(file)  # the format before torch 1.6 cannot be mapped
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


def _without_namespaces(value: Any) -> Any:
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return {key: _without_namespaces(entry) for key, entry in value.items()}
    return value


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
