"""Latents and text states on disk, computed once: safetensors shards and a manifest per cache.

    <path>/manifest.json               what the cache was made with and for
    <path>/shard-00000.safetensors     ids [n], crc [...], and
        latents: moments [n, 2, 2C, h, w] float32, unscaled, of the centre crop and of its mirror image
        text:    states [sum t, C] float32 and offsets [n + 1]: caption k owns rows offsets[k] to offsets[k + 1]

Shards appear under their name only when complete, so a killed run continues at the first one missing. Readers map the
files into memory and check a CRC of what they return. A cache made with another VAE, latent scale, text encoder, split,
size or caption than asked for is refused. Not noticed: image files that changed under the same id.

Shape letters: n items of a shard, C channels, h x w latents, t tokens of one caption.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MAKE_IT = "make it with python -m scripts.cache_latents"
MAKE_AGAIN = "delete that file and run the same scripts.cache_latents command again"

Progress = Callable[[int], None]  # called with the number of items done, first with what was there already


@dataclass(frozen=True)
class LatentCacheKey:
    """What latents depend on. vae_id: `LatentCodec.id`. crop: only "center" can be cached."""

    vae_id: str
    latent_scale: float
    split: str
    img_size: int
    crop: str = "center"


@dataclass(frozen=True)
class TextCacheKey:
    """What text states depend on. text_encoder_id: `TextEncoder.id`."""

    text_encoder_id: str
    split: str


CacheKey = LatentCacheKey | TextCacheKey


class _Shards:
    """The reading side that both caches share: manifest, ids, one lazily opened memory map per shard and process."""

    def __init__(self, path: str | Path, key: CacheKey, kind: str) -> None:
        self.path = Path(path)
        manifest = _read_manifest(self.path)
        _require_same(self.path, manifest, {"format": kind, "version": FORMAT_VERSION, **asdict(key)})
        self.num_items = int(manifest["num_items"])
        self.shard_size = int(manifest["shard_size"])
        self._handles: dict[int, Any] = {}
        self._pid = os.getpid()
        ids = [self.tensor(shard, "ids").numpy() for shard in range(self._require_complete())]
        self._ids = np.concatenate(ids)
        self._order = np.argsort(self._ids, kind="stable")
        self._sorted = self._ids[self._order]
        if len(self._ids) != self.num_items:
            raise ValueError(f"{self.path} holds {len(self._ids)} items, but its manifest says {self.num_items}")

    def _require_complete(self) -> int:
        total = num_shards(self.num_items, self.shard_size)
        there = sum(shard_path(self.path, shard).is_file() for shard in range(total))
        if there < total:
            raise ValueError(
                f"{self.path} is incomplete: {there} of {total} shards. "
                "Run the same scripts.cache_latents command again to finish it"
            )
        return total

    def require(self, ids: Iterable[int]) -> None:
        """Raises ValueError naming the first of `ids` that is not in the cache."""
        wanted = np.fromiter(ids, dtype=np.int64)
        missing = wanted[~np.isin(wanted, self._ids)]
        if len(missing):
            raise ValueError(
                f"{self.path} lacks {len(missing)} of the {len(wanted)} items asked for, id {missing[0]} first"
            )

    def locate(self, item_id: int) -> tuple[int, int]:
        """-> (shard, row in it)."""
        place = int(np.searchsorted(self._sorted, item_id))
        if place == len(self._sorted) or self._sorted[place] != item_id:
            raise KeyError(f"{self.path} holds no item with id {item_id}")
        return divmod(int(self._order[place]), self.shard_size)

    def handle(self, shard: int) -> Any:
        if self._pid != os.getpid():  # a forked worker opens its own
            self._handles, self._pid = {}, os.getpid()
        if shard not in self._handles:
            self._handles[shard] = _open_shard(shard_path(self.path, shard))
        return self._handles[shard]

    def tensor(self, shard: int, name: str) -> Tensor:
        return self.handle(shard).get_tensor(name).clone()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handles": {}}


class LatentCache:
    """Moments by image id. Safe to use from DataLoader workers."""

    KIND = "structmar-latents"

    def __init__(self, path: str | Path, key: LatentCacheKey) -> None:
        """Raises FileNotFoundError if there is no cache, ValueError if it is incomplete, damaged or of another key."""
        self._shards = _Shards(path, key, self.KIND)
        self.path = self._shards.path
        self.split, self.img_size, self.crop = key.split, key.img_size, key.crop

    def moments(self, image_id: int, is_flipped: bool) -> Tensor:
        """-> [2C, h, w] float32, unscaled. Raises KeyError for an unknown image, ValueError for a damaged shard."""
        shard, row = self._shards.locate(image_id)
        handle = self._shards.handle(shard)
        moments = handle.get_slice("moments")[row, int(is_flipped)].clone()  # [2C, h, w]
        _verify(moments, handle.get_slice("crc")[row, int(is_flipped)], shard_path(self.path, shard), image_id)
        return moments

    def require(self, image_ids: Iterable[int]) -> None:
        self._shards.require(image_ids)

    def __len__(self) -> int:
        return self._shards.num_items


class TextCache:
    """Token states by caption id. Safe to use from DataLoader workers."""

    KIND = "structmar-text"

    def __init__(self, path: str | Path, key: TextCacheKey) -> None:
        """Raises FileNotFoundError if there is no cache, ValueError if it is incomplete, damaged or of another key."""
        self._shards = _Shards(path, key, self.KIND)
        self.path = self._shards.path
        self.split = key.split

    def states(self, caption_id: int, caption: str) -> Tensor:
        """-> [t, C] float32. Raises KeyError for an unknown id, ValueError if another caption was encoded under it."""
        shard, row = self._shards.locate(caption_id)
        handle = self._shards.handle(shard)
        if int(handle.get_slice("caption_crc")[row]) != _crc(caption.encode()):
            raise ValueError(f"{self.path}: caption {caption_id} was another text when encoded, now it is {caption!r}")
        start, stop = handle.get_slice("offsets")[row : row + 2].tolist()
        states = handle.get_slice("states")[start:stop].clone()  # [t, C]
        _verify(states, handle.get_slice("crc")[row], shard_path(self.path, shard), caption_id)
        return states

    def require(self, caption_ids: Iterable[int]) -> None:
        self._shards.require(caption_ids)

    def __len__(self) -> int:
        return self._shards.num_items


def write_latent_cache(
    path: str | Path,
    key: LatentCacheKey,
    image_ids: Sequence[int],
    load_batches: Callable[[list[list[int]]], Iterable[Tensor]],
    encode: Callable[[Tensor], Tensor],
    batch_size: int = 32,
    shard_size: int = 1024,
    on_progress: Progress | None = None,
) -> None:
    """Writes the missing shards.

    load_batches: lists of positions in `image_ids` -> as many pixel batches [B, 3, H, W] in [-1, 1], in order.
    encode: pixels -> moments [B, 2C, h, w], unscaled. Raises ValueError if `path` holds a cache of something else.
    """
    if key.crop != "center":
        raise ValueError(f"only the 'center' crop can be cached, got {key.crop!r}")
    missing = _prepare(Path(path), LatentCache.KIND, key, image_ids, [str(each) for each in image_ids], shard_size)
    batches = [chunk for shard in missing for chunk in _chunks(_rows(shard, len(image_ids), shard_size), batch_size)]
    loaded = iter(load_batches(batches))
    done = len(image_ids) - sum(map(len, batches))
    _report(on_progress, done)
    for shard in missing:
        rows = _rows(shard, len(image_ids), shard_size)
        collected = []
        for chunk in _chunks(rows, batch_size):
            collected.append(_both_flips(next(loaded), encode, len(chunk)))
            done += len(chunk)
            _report(on_progress, done)
        moments = torch.cat(collected)  # [n, 2, 2C, h, w]
        crc = torch.tensor([[_tensor_crc(view) for view in pair] for pair in moments], dtype=torch.int64)  # [n, 2]
        ids = torch.tensor([image_ids[row] for row in rows], dtype=torch.int64)
        _save_shard({"moments": moments, "crc": crc, "ids": ids}, shard_path(path, shard))


def write_text_cache(
    path: str | Path,
    key: TextCacheKey,
    captions: Mapping[int, str],
    encode: Callable[[list[str]], list[Tensor]],
    batch_size: int = 256,
    shard_size: int = 16384,
    on_progress: Progress | None = None,
) -> None:
    """Writes the missing shards. captions: id -> text. encode: captions -> one [t, C] each.

    Raises ValueError if `path` holds a cache of something else.
    """
    ids = list(captions)
    missing = _prepare(Path(path), TextCache.KIND, key, ids, [f"{each}\t{captions[each]}" for each in ids], shard_size)
    done = len(ids) - sum(len(_rows(shard, len(ids), shard_size)) for shard in missing)
    _report(on_progress, done)
    for shard in missing:
        rows = _rows(shard, len(ids), shard_size)
        states: list[Tensor] = []
        for chunk in _chunks(rows, batch_size):
            encoded = encode([captions[ids[row]] for row in chunk])
            assert len(encoded) == len(chunk), f"{len(chunk)} captions gave {len(encoded)} encodings"
            states += [state.float().cpu() for state in encoded]
            done += len(chunk)
            _report(on_progress, done)
        lengths = torch.tensor([0] + [len(state) for state in states], dtype=torch.int64)
        shard_captions = [captions[ids[row]] for row in rows]
        tensors = {
            "states": torch.cat(states),  # [sum t, C]
            "offsets": lengths.cumsum(0),
            "crc": torch.tensor([_tensor_crc(state) for state in states], dtype=torch.int64),
            "caption_crc": torch.tensor([_crc(caption.encode()) for caption in shard_captions], dtype=torch.int64),
            "ids": torch.tensor([ids[row] for row in rows], dtype=torch.int64),
        }
        _save_shard(tensors, shard_path(path, shard))


def shard_path(path: str | Path, shard: int) -> Path:
    return Path(path) / f"shard-{shard:05d}.safetensors"


def num_shards(num_items: int, shard_size: int) -> int:
    return -(-num_items // shard_size)


def _rows(shard: int, num_items: int, shard_size: int) -> list[int]:
    return list(range(shard * shard_size, min((shard + 1) * shard_size, num_items)))


def _chunks(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _both_flips(pixels: Tensor, encode: Callable[[Tensor], Tensor], count: int) -> Tensor:
    """pixels: [B, 3, H, W] -> [B, 2, 2C, h, w] float32 on the CPU."""
    assert len(pixels) == count, f"{count} images were asked for, {len(pixels)} loaded"
    pair = [encode(pixels), encode(pixels.flip(-1))]
    return torch.stack([moments.float().cpu() for moments in pair], dim=1)


def _report(on_progress: Progress | None, done: int) -> None:
    if on_progress is not None:
        on_progress(done)


def _prepare(
    path: Path, kind: str, key: CacheKey, ids: Sequence[int], contents: Iterable[str], shard_size: int
) -> list[int]:
    """Writes the manifest, or compares it with the one there; -> the shards that are missing or damaged."""
    if not ids or len(set(ids)) != len(ids):
        raise ValueError(f"a cache needs distinct ids and at least one, got {len(ids)} with {len(set(ids))} distinct")
    if shard_size < 1:
        raise ValueError(f"shard_size must be at least 1, got {shard_size}")
    manifest = {
        "format": kind,
        "version": FORMAT_VERSION,
        **asdict(key),
        "num_items": len(ids),
        "shard_size": shard_size,
        "digest": hashlib.sha256("\n".join(contents).encode()).hexdigest(),
    }
    path.mkdir(parents=True, exist_ok=True)
    if (path / MANIFEST).is_file():
        _require_same(path, _read_manifest(path), manifest)
    elif leftover := sorted(path.glob("shard-*.safetensors")):
        raise ValueError(
            f"{path} holds shards but no {MANIFEST}: remove {leftover[0].name} and its like, or choose another folder"
        )
    else:
        _replace(path / MANIFEST, lambda temporary: temporary.write_text(json.dumps(manifest, indent=2) + "\n"))
    shards = range(num_shards(len(ids), shard_size))
    missing = [
        shard
        for shard in shards
        if not _is_complete(shard_path(path, shard), [ids[row] for row in _rows(shard, len(ids), shard_size)])
    ]
    logger.info("%s: %d of %d shards are there already", path, len(shards) - len(missing), len(shards))
    return missing


def _is_complete(shard: Path, ids: Sequence[int]) -> bool:
    if not shard.is_file():
        return False
    try:
        stored = _open_shard(shard).get_tensor("ids").tolist()
    except ValueError as error:
        logger.warning("%s; writing it again", error)
        return False
    return bool(stored == list(ids))


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"no cache at {path}: {MANIFEST} not found; {MAKE_IT}")
    try:
        manifest = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid json: {error}") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{file} must hold a json object, got a {type(manifest).__name__}")
    return manifest


def _require_same(path: Path, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    different = [
        f"{name} {stored.get(name)!r}, but {value!r} is asked for"
        for name, value in asked.items()
        if stored.get(name) != value
    ]
    if different:
        raise ValueError(
            f"the cache {path} was made with {'; with '.join(different)}. Use another folder or remove this one"
        )


def _open_shard(shard: Path) -> Any:
    try:
        return safe_open(shard, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cache shard {shard} is damaged ({error}): {MAKE_AGAIN}") from error


def _save_shard(tensors: dict[str, Tensor], shard: Path) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    content = save(contiguous)  # save_file would make a file that only its owner may read
    _replace(shard, lambda temporary: temporary.write_bytes(content))


def _replace(file: Path, write: Callable[[Path], object]) -> None:
    """Writes beside `file`, flushes to disk, then renames: the name never refers to half a file."""
    temporary = file.with_name(file.name + ".tmp")
    write(temporary)
    with temporary.open("rb") as written:
        os.fsync(written.fileno())
    os.replace(temporary, file)


def _crc(data: bytes | memoryview) -> int:
    return zlib.crc32(data)


def _tensor_crc(tensor: Tensor) -> int:
    return _crc(tensor.contiguous().numpy().data.cast("B"))


def _verify(tensor: Tensor, crc: Tensor, shard: Path, item_id: int) -> None:
    if _tensor_crc(tensor) != int(crc):
        raise ValueError(f"cache shard {shard} is damaged (checksum of item {item_id}): {MAKE_AGAIN}")
