"""The files of a cache: a manifest and safetensors shards, read with their form checked, written whole or not at all."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from models.frozen.codes import code_dtype
from util.output import write_atomic
from util.read import read_json

FORMAT_VERSION = 2
UNSAID = ("max_text_tokens",)
"""What manifests name only where it is not the encoder's own."""
MANIFEST = "manifest.json"
MAKE_IT = "make it with python -m scripts.cache_latents"
MAKE_AGAIN = "run the same scripts.cache_latents command again, it replaces what is damaged or has changed"

ShardForm = Mapping[str, tuple[str, int]]
"""Name -> dtype as safetensors writes it, number of dimensions. Entries but LONG ones have a row per item."""
LATENT_FORM: ShardForm = {"ids": ("I64", 1), "crc": ("I64", 2), "moments": ("F32", 5), "facts": ("I64", 2),
                          "digest": ("U8", 2)}  # fmt: skip
TEXT_FORM: ShardForm = {"ids": ("I64", 1), "crc": ("I64", 1), "caption_crc": ("I64", 1), "offsets": ("I64", 1),
                        "states": ("F32", 2)}  # fmt: skip
LONG = ("offsets", "states")


def code_form(codebook_size: int) -> ShardForm:
    """Of codes: those of the largest codebooks take 32 bits each."""
    dtype = "I16" if code_dtype(codebook_size) == torch.int16 else "I32"
    return {name: form for name, form in LATENT_FORM.items() if name != "moments"} | {"codes": (dtype, 5)}


def shard_path(path: str | Path, shard: int) -> Path:
    return Path(path) / f"shard-{shard:05d}.safetensors"


def num_shards(num_items: int, shard_size: int) -> int:
    return -(-num_items // shard_size)


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises FileNotFoundError if there is no cache at `path`, ValueError if its manifest is none."""
    file = path / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"no cache at {path}: {MANIFEST} not found; {MAKE_IT}")
    manifest = read_json(file, "cache manifest")
    if not isinstance(manifest, dict):
        raise ValueError(f"{file} must hold a json object, got a {type(manifest).__name__}")
    for name in ("num_items", "shard_size"):
        if type(manifest.get(name)) is not int or manifest[name] < 1:
            raise ValueError(f"{file}: {name} must be a whole number of at least 1, got {manifest.get(name)!r}")
    return manifest


def require_same(path: Path, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raises ValueError naming what the cache was made with and what is asked for, if these differ."""
    version = stored.get("version")
    if stored.get("format") == asked["format"] and isinstance(version, int) and version < FORMAT_VERSION:
        raise ValueError(
            f"the cache {path} has format version {version}, which does not say what it was made of (this program "
            f"reads {FORMAT_VERSION}): remove that folder and {MAKE_IT}"
        )
    different = [
        f"{name} {stored.get(name)!r}, but {value!r} is asked for"
        for name, value in (dict.fromkeys(UNSAID) | dict(asked)).items()
        if stored.get(name) != value
    ]
    if different:
        raise ValueError(
            f"the cache {path} was made with {'; with '.join(different)}. Use another folder or remove this one"
        )


def open_shard(shard: Path, form: ShardForm) -> Any:
    """A handle of safetensors on a mapped file. Raises ValueError naming it if it is cut off or of another form."""
    try:
        handle = safe_open(shard, framework="pt")
        parts = {name: handle.get_slice(name) for name in form}
        shapes = {name: part.get_shape() for name, part in parts.items()}
        dtypes = {name: part.get_dtype() for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise damaged(shard, str(error)) from error
    for name, (dtype, num_dims) in form.items():
        is_long = name in LONG or shapes[name][:1] == shapes["ids"][:1]
        if dtypes[name] != dtype or len(shapes[name]) != num_dims or not is_long:
            raise damaged(shard, f"{name} is {dtypes[name]} {shapes[name]}")
    if "offsets" in form and shapes["offsets"] != [shapes["ids"][0] + 1]:
        raise damaged(shard, f"{shapes['ids'][0]} items, but {shapes['offsets'][0]} offsets")
    return handle


def damaged(shard: Path, reason: str) -> ValueError:
    return ValueError(f"cache shard {shard} is damaged ({reason}): {MAKE_AGAIN}")


def save_shard(tensors: Mapping[str, Tensor], shard: Path) -> None:
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    write_atomic(shard, lambda file: file.write(content))


def crc(data: bytes | memoryview) -> int:
    return zlib.crc32(data)


def tensor_crc(tensor: Tensor) -> int:
    return crc(tensor.contiguous().numpy().data.cast("B"))


def fault(tensor: Tensor, expected_crc: int, codebook_size: int = 0) -> str | None:
    """What is wrong with an item's values: not those that were written, or not finite; None if nothing is.

    codebook_size: of codes, which lie below it; 0 for other values.
    """
    if tensor_crc(tensor) != expected_crc:
        return "checksum"
    if codebook_size and tensor.numel() and not 0 <= int(tensor.min()) <= int(tensor.max()) < codebook_size:
        return f"codes from {int(tensor.min())} to {int(tensor.max())} instead of 0 to {codebook_size - 1}"
    return None if bool(torch.isfinite(tensor).all()) else "not finite"
