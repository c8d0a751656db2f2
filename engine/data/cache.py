"""Latents and text states on disk, computed once: safetensors shards and a manifest per cache. Written by cache_write.py.

    <path>/manifest.json               what the cache was made with and for
    <path>/shard-00000.safetensors     ids [n], crc [...], and
        latents: moments [n, 2, 2C, h, w] float32, unscaled, of the centre crop and of its mirror image, or
                 codes [n, 2, 1, h, w] int16 (int32 beyond 32768 codes): those of the mirror are not the codes mirrored;
                 facts [n, 4] int64 and digest [n, 16] uint8: the picture file of each (sources.py)
        text:    states [sum t, C] float32 and offsets [n + 1]: caption k owns rows offsets[k] to offsets[k + 1];
                 caption_crc [n]: of the captions

Shards appear under their name only when complete. Readers map the files into memory and check a CRC of what they
return. A cache made with another VAE, latent scale, codebook, text encoder, split, size, picture or caption than asked for
is refused; pictures are compared by `check.py` before the first step, as far as they are on this machine.

Shape letters: n items of a shard, C channels, h x w latents, t tokens of one caption.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from engine.data.shards import (
    FORMAT_VERSION,
    LATENT_FORM,
    MAKE_AGAIN,
    TEXT_FORM,
    ShardForm,
    code_form,
    crc,
    damaged,
    fault,
    num_shards,
    open_shard,
    read_manifest,
    require_same,
    shard_path,
)
from engine.data.sources import Source
from util.read import short_repr


@dataclass(frozen=True)
class LatentCacheKey:
    """What latents depend on, besides pictures. vae_id: `ImageCodec.id`. crop: only "center" can be cached.

    codebook_size: of codes; 0 for moments, whose manifests do not name it.
    """

    vae_id: str
    latent_scale: float
    split: str
    img_size: int
    crop: str = "center"
    codebook_size: int = 0

    @property
    def kind(self) -> str:
        return "structmar-codes" if self.codebook_size else "structmar-latents"

    @property
    def entry(self) -> str:
        """What a shard's values are called."""
        return "codes" if self.codebook_size else "moments"

    @property
    def form(self) -> ShardForm:
        return code_form(self.codebook_size) if self.codebook_size else LATENT_FORM

    def stated(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {name: value for name, value in asdict(self).items() if name != "codebook_size" or value}


@dataclass(frozen=True)
class TextCacheKey:
    """What text states depend on, besides captions. text_encoder_id: `TextEncoder.id`. max_text_tokens: its
    `stated_cut`, which manifests of 0 do not name."""

    text_encoder_id: str
    split: str
    max_text_tokens: int = 0

    @property
    def kind(self) -> str:
        return "structmar-text"

    @property
    def form(self) -> ShardForm:
        return TEXT_FORM

    def stated(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {name: value for name, value in asdict(self).items() if name != "max_text_tokens" or value}


CacheKey = LatentCacheKey | TextCacheKey


class _Shards:
    """The reading side that both caches share: manifest, ids, one lazily opened memory map per shard and process."""

    def __init__(self, path: str | Path, key: CacheKey) -> None:
        self.path, self.form = Path(path), key.form
        manifest = read_manifest(self.path)
        require_same(self.path, manifest, {"format": key.kind, "version": FORMAT_VERSION, **key.stated()})
        self.num_items = int(manifest["num_items"])
        self.shard_size = int(manifest["shard_size"])
        self._handles: dict[int, Any] = {}
        self._pid = os.getpid()
        self.total = self._require_complete()
        self._ids = self.all_rows("ids")
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

    def place(self, item_id: int) -> int:
        """Where the item stands, counted over all shards. Raises KeyError for an unknown id."""
        place = int(np.searchsorted(self._sorted, item_id))
        if place == len(self._sorted) or self._sorted[place] != item_id:
            raise KeyError(f"{self.path} holds no item with id {item_id}")
        return int(self._order[place])

    def locate(self, item_id: int) -> tuple[int, int]:
        """-> (shard, row in it)."""
        return divmod(self.place(item_id), self.shard_size)

    def handle(self, shard: int) -> Any:
        if self._pid != os.getpid():  # a forked worker opens its own
            self._handles, self._pid = {}, os.getpid()
        if shard not in self._handles:
            self._handles[shard] = open_shard(shard_path(self.path, shard), self.form)
        return self._handles[shard]

    def all_rows(self, name: str) -> np.ndarray:
        """One small entry of all shards: [num_items, ...]."""
        return np.concatenate([self.handle(shard).get_tensor(name).numpy() for shard in range(self.total)])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handles": {}}


class LatentCache:
    """Moments or codes by image id. Safe to use from DataLoader workers."""

    def __init__(self, path: str | Path, key: LatentCacheKey) -> None:
        """Raises FileNotFoundError if there is no cache, ValueError if it is incomplete, damaged or of another key."""
        self._shards, self._key = _Shards(path, key), key
        self.path = self._shards.path
        self.split, self.img_size, self.crop = key.split, key.img_size, key.crop

    def moments(self, image_id: int, is_flipped: bool) -> Tensor:
        """-> [2C, h, w] float32, unscaled, or codes [1, h, w]. Raises KeyError for an unknown image, ValueError for a
        damaged shard."""
        shard, row = self._shards.locate(image_id)
        handle = self._shards.handle(shard)
        moments = handle.get_slice(self._key.entry)[row, int(is_flipped)].clone()  # [2C, h, w]
        own_crc = handle.get_slice("crc")[row, int(is_flipped)]
        _verify(moments, own_crc, shard_path(self.path, shard), image_id, self._key.codebook_size)
        return moments

    def require(self, image_ids: Iterable[int]) -> None:
        self._shards.require(image_ids)

    def sources(self) -> dict[int, Source]:
        """The picture file that each image's latents were made of, by image id."""
        rows = zip(*(self._shards.all_rows(name) for name in ("ids", "facts", "digest")), strict=True)
        return {int(image_id): Source.from_rows(facts, digest) for image_id, facts, digest in rows}

    def shard_files(self) -> list[Path]:
        return [shard_path(self.path, shard) for shard in range(self._shards.total)]

    def verify(self, shard: int) -> None:
        """Raises ValueError naming the shard and the image if one of its latents is not what was written, is not
        finite, or is a code beyond the codebook."""
        name, path = self._key.entry, shard_path(self.path, shard)
        handle = open_shard(path, self._key.form)
        first = self._shards.handle(0).get_slice(name).get_shape()[1:]
        moments, crcs = handle.get_tensor(name), handle.get_tensor("crc")
        if list(moments.shape[1:]) != first or first[0] != 2 or list(crcs.shape[1:]) != [2]:
            raise damaged(path, f"{name} {list(moments.shape)} beside others of {first}")
        for image_id, pair, own_crcs in zip(handle.get_tensor("ids").tolist(), moments, crcs.tolist(), strict=True):
            for view, own_crc in zip(pair, own_crcs, strict=True):
                _verify(view, own_crc, path, image_id, self._key.codebook_size)

    def __len__(self) -> int:
        return self._shards.num_items


class TextCache:
    """Token states by caption id. Safe to use from DataLoader workers."""

    def __init__(self, path: str | Path, key: TextCacheKey) -> None:
        """Raises FileNotFoundError if there is no cache, ValueError if it is incomplete, damaged or of another key."""
        self._shards = _Shards(path, key)
        self.path = self._shards.path
        self.split = key.split

    def states(self, caption_id: int, caption: str) -> Tensor:
        """-> [t, C] float32. Raises KeyError for an unknown id, ValueError if another caption was encoded under it."""
        shard, row = self._shards.locate(caption_id)
        handle = self._shards.handle(shard)
        self._require_caption(caption_id, caption, int(handle.get_slice("caption_crc")[row]))
        start, stop = handle.get_slice("offsets")[row : row + 2].tolist()
        states = handle.get_slice("states")[start:stop].clone()  # [t, C]
        _verify(states, handle.get_slice("crc")[row], shard_path(self.path, shard), caption_id)
        return states

    def require(self, captions: Mapping[int, str]) -> None:
        """captions: id -> text. Raises ValueError naming the first that is missing or was another text when encoded."""
        self._shards.require(captions)
        caption_crcs = self._shards.all_rows("caption_crc")
        for caption_id, caption in captions.items():
            self._require_caption(caption_id, caption, int(caption_crcs[self._shards.place(caption_id)]))

    def _require_caption(self, caption_id: int, caption: str, cached_crc: int) -> None:
        own = crc(caption.encode())
        if own != cached_crc:
            raise ValueError(
                f"{self.path}: caption {caption_id} was another text when encoded (checksum {cached_crc:08x}), now it "
                f"is {short_repr(caption)} ({own:08x}): {MAKE_AGAIN}"
            )

    def shard_files(self) -> list[Path]:
        return [shard_path(self.path, shard) for shard in range(self._shards.total)]

    def verify(self, shard: int) -> None:
        """Raises ValueError naming the shard and the caption if states are not what was written, or not finite."""
        path, handle = shard_path(self.path, shard), open_shard(shard_path(self.path, shard), TEXT_FORM)
        states, offsets = handle.get_tensor("states"), handle.get_tensor("offsets").tolist()
        if offsets[0] != 0 or offsets[-1] != len(states) or any(np.diff(offsets) < 1):
            raise damaged(path, f"offsets that do not part its {len(states)} states")
        rows = zip(handle.get_tensor("ids").tolist(), handle.get_tensor("crc").tolist(), strict=True)
        for row, (caption_id, own_crc) in enumerate(rows):
            _verify(states[offsets[row] : offsets[row + 1]], own_crc, path, caption_id)

    def __len__(self) -> int:
        return self._shards.num_items


def _verify(tensor: Tensor, own_crc: Tensor | int, shard: Path, item_id: int, codebook_size: int = 0) -> None:
    found = fault(tensor, int(own_crc), codebook_size)
    if found is not None:
        raise damaged(shard, f"{found} of item {item_id}")
