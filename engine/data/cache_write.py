"""Writes the caches that cache.py reads: what is missing, damaged or made of another picture or caption, and nothing else.

A killed run continues at the first shard that is missing. Several processes share the shards.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.data.cache import CacheKey, LatentCacheKey, TextCacheKey
from engine.data.shards import (
    FORMAT_VERSION,
    MANIFEST,
    TEXT_FORM,
    ShardForm,
    crc,
    damaged,
    fault,
    num_shards,
    open_shard,
    read_manifest,
    require_same,
    save_shard,
    shard_path,
    tensor_crc,
)
from engine.data.sources import Photograph, Source
from util.distributed import failing_together
from util.output import remove_unfinished, write_text_atomic

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # called with the items done, first with those there already, and how many in all
CropBatch = tuple[Tensor, Tensor, Tensor]
"""pixels [B, 3, H, W] in [-1, 1]; facts [B, 4] and digest [B, 16] of each file, see `Source.to_tensors`"""


@dataclass(frozen=True)
class Share:
    """Which of the shards this process writes: every `world_size`-th, from `rank` on."""

    rank: int = 0
    world_size: int = 1


WHOLE = Share()


def write_latent_cache(
    path: str | Path,
    key: LatentCacheKey,
    photographs: Sequence[Photograph],
    load_batches: Callable[[list[list[int]]], Iterable[CropBatch]],
    encode: Callable[[Tensor], Tensor],
    batch_size: int = 32,
    shard_size: int = 1024,
    on_progress: Progress | None = None,
    share: Share = WHOLE,
) -> None:
    """Writes what is missing.

    load_batches: lists of positions in `photographs` -> as many batches, in order.
    encode: pixels -> moments [B, 2C, h, w], unscaled, or codes [B, 1, h, w]: `ImageCodec.encode`.
    Raises ValueError if `path` holds a cache of something else.
    """
    if key.crop != "center":
        raise ValueError(f"only the 'center' crop can be cached, got {key.crop!r}")
    ids = [photograph.id for photograph in photographs]
    _prepare(Path(path), key, ids, shard_size, share)
    work = _Work.of(Path(path), ids, shard_size, share, key.form, lambda row: _is_latent_stale(row, key, photographs))
    work.report(on_progress)
    chunks = {shard: _chunks(rows, batch_size) for shard, rows in work.stale.items()}
    loaded = iter(load_batches([chunk for shard in chunks for chunk in chunks[shard]]))
    for shard, rows in work.stale.items():
        collected: list[tuple[Tensor, Tensor, Tensor]] = []
        for chunk in chunks[shard]:
            pixels, facts, digests = next(loaded)
            collected.append((_both_flips(pixels, encode, len(chunk)), facts, digests))
            work.advance(len(chunk), on_progress)
        moments, facts, digests = (torch.cat(parts) for parts in zip(*collected, strict=True))
        crcs = torch.tensor([[tensor_crc(view) for view in pair] for pair in moments], dtype=torch.int64)  # [n, 2]
        tensors = {key.entry: moments, "crc": crcs, "facts": facts, "digest": digests}
        work.save(shard, rows, tensors)


def write_text_cache(
    path: str | Path,
    key: TextCacheKey,
    captions: Mapping[int, str],
    encode: Callable[[list[str]], list[Tensor]],
    batch_size: int = 256,
    shard_size: int = 16384,
    on_progress: Progress | None = None,
    share: Share = WHOLE,
) -> None:
    """Writes what is missing. captions: id -> text. encode: captions -> one [t, C] each.

    Raises ValueError if `path` holds a cache of something else.
    """
    ids = list(captions)
    _prepare(Path(path), key, ids, shard_size, share)
    work = _Work.of(Path(path), ids, shard_size, share, TEXT_FORM, lambda row: _is_text_stale(row, captions[row.id]))
    work.report(on_progress)
    for shard, rows in work.stale.items():
        made: dict[int, Tensor] = {}
        for chunk in _chunks(rows, batch_size):
            encoded = encode([captions[ids[row]] for row in chunk])
            assert len(encoded) == len(chunk), f"{len(chunk)} captions gave {len(encoded)} encodings"
            made |= zip(chunk, (state.float().cpu() for state in encoded), strict=True)
            work.advance(len(chunk), on_progress)
        all_rows = work.rows(shard)
        if len(made) < len(all_rows):
            old = open_shard(shard_path(path, shard), TEXT_FORM)
            kept = {row: _states(old, place) for place, row in enumerate(all_rows) if row not in made}
            made |= kept
        states = [made[row] for row in all_rows]
        lengths = torch.tensor([0] + [len(state) for state in states], dtype=torch.int64)
        own_captions = [captions[ids[row]] for row in all_rows]
        tensors = {
            "states": torch.cat(states),  # [sum t, C]
            "offsets": lengths.cumsum(0),
            "crc": torch.tensor([tensor_crc(state) for state in states], dtype=torch.int64),
            "caption_crc": torch.tensor([crc(caption.encode()) for caption in own_captions], dtype=torch.int64),
        }
        work.save(shard, all_rows, tensors)


@dataclass(frozen=True)
class _Row:
    """A row of a shard that is there. place: in the shard; row: among all items."""

    handle: Any
    place: int
    row: int
    id: int


@dataclass
class _Work:
    """What this process has to do. stale: shard -> the rows to be made, counted over all items."""

    path: Path
    ids: Sequence[int]
    shard_size: int
    form: ShardForm
    stale: dict[int, list[int]]
    total: int
    done: int

    @staticmethod
    def of(
        path: Path,
        ids: Sequence[int],
        shard_size: int,
        share: Share,
        form: ShardForm,
        is_stale: Callable[[_Row], bool],
    ) -> _Work:
        work = _Work(path, ids, shard_size, form, {}, 0, 0)
        own = range(share.rank, num_shards(len(ids), shard_size), share.world_size)
        for shard in own:
            rows = work._stale_rows(shard, is_stale)
            work.total += len(work.rows(shard))
            work.done += len(work.rows(shard)) - len(rows)
            if rows:
                work.stale[shard] = rows
        logger.info("%s: %d of %d items are there already", path, work.done, work.total)
        return work

    def rows(self, shard: int) -> list[int]:
        return list(range(shard * self.shard_size, min((shard + 1) * self.shard_size, len(self.ids))))

    def _stale_rows(self, shard: int, is_stale: Callable[[_Row], bool]) -> list[int]:
        file, rows = shard_path(self.path, shard), self.rows(shard)
        if not file.is_file():
            return rows
        try:
            handle = open_shard(file, self.form)
            is_complete = handle.get_tensor("ids").tolist() == [self.ids[row] for row in rows]
            if not is_complete:
                return rows
            found = [row for place, row in enumerate(rows) if is_stale(_Row(handle, place, row, self.ids[row]))]
        except ValueError as error:
            logger.warning("%s; writing it again", error)
            return rows
        if found:
            logger.info("%s: %d items are damaged or of something else now, id %d first", file, len(found),
                        self.ids[found[0]])  # fmt: skip
        return found

    def report(self, on_progress: Progress | None) -> None:
        if on_progress is not None:
            on_progress(self.done, self.total)

    def advance(self, count: int, on_progress: Progress | None) -> None:
        self.done += count
        self.report(on_progress)

    def save(self, shard: int, made: Sequence[int], tensors: dict[str, Tensor]) -> None:
        """tensors: the entries of the rows `made`, which replace those of the shard that is there."""
        file, rows = shard_path(self.path, shard), self.rows(shard)
        if len(made) < len(rows):
            old, places = open_shard(file, self.form), [rows.index(row) for row in made]
            for name, new in tensors.items():
                whole = old.get_tensor(name).clone()
                if whole.shape[1:] != new.shape[1:]:
                    raise damaged(file, f"{name} {list(whole.shape)} beside new ones of {list(new.shape)}")
                whole[places] = new
                tensors[name] = whole
        ids = torch.tensor([self.ids[row] for row in rows], dtype=torch.int64)
        save_shard(tensors | {"ids": ids}, file)


def _is_latent_stale(row: _Row, key: LatentCacheKey, photographs: Sequence[Photograph]) -> bool:
    moments, crcs = row.handle.get_slice(key.entry)[row.place], row.handle.get_slice("crc")[row.place].tolist()
    if any(fault(view, own_crc, key.codebook_size) for view, own_crc in zip(moments, crcs, strict=True)):
        return True
    facts, digest = (row.handle.get_slice(name)[row.place].numpy() for name in ("facts", "digest"))
    return Source.from_rows(facts, digest).difference(photographs[row.row]) is not None


def _is_text_stale(row: _Row, caption: str) -> bool:
    if int(row.handle.get_slice("caption_crc")[row.place]) != crc(caption.encode()):
        return True
    states = _states(row.handle, row.place)
    return len(states) == 0 or fault(states, int(row.handle.get_slice("crc")[row.place])) is not None


def _states(handle: Any, place: int) -> Tensor:
    start, stop = handle.get_slice("offsets")[place : place + 2].tolist()
    states: Tensor = handle.get_slice("states")[start:stop]
    return states


def _chunks(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _both_flips(pixels: Tensor, encode: Callable[[Tensor], Tensor], count: int) -> Tensor:
    """pixels: [B, 3, H, W] -> [B, 2, 2C, h, w] float32, or codes [B, 2, 1, h, w], on the CPU."""
    assert len(pixels) == count, f"{count} images were asked for, {len(pixels)} loaded"
    pair = [encode(pixels), encode(pixels.flip(-1))]
    on_cpu = [(moments.float() if moments.is_floating_point() else moments).cpu() for moments in pair]
    return torch.stack(on_cpu, dim=1)


def _prepare(path: Path, key: CacheKey, ids: Sequence[int], shard_size: int, share: Share) -> None:
    """Writes the manifest, on the first process, or compares it with the one there."""
    if not ids or len(set(ids)) != len(ids):
        raise ValueError(f"a cache needs distinct ids and at least one, got {len(ids)} with {len(set(ids))} distinct")
    if shard_size < 1:
        raise ValueError(f"shard_size must be at least 1, got {shard_size}")
    manifest = {
        "format": key.kind,
        "version": FORMAT_VERSION,
        **key.stated(),
        "num_items": len(ids),
        "shard_size": shard_size,
        "ids_digest": hashlib.sha256("\n".join(map(str, ids)).encode()).hexdigest(),
    }
    with failing_together():
        if share.rank > 0:
            return
        path.mkdir(parents=True, exist_ok=True)
        remove_unfinished(path)
        if (path / MANIFEST).is_file():
            require_same(path, read_manifest(path), manifest)
        elif leftover := sorted(path.glob("shard-*.safetensors")):
            raise ValueError(
                f"{path} holds shards but no {MANIFEST}: remove {leftover[0].name} and its like, or choose another "
                "folder"
            )
        else:
            write_text_atomic(path / MANIFEST, json.dumps(manifest, indent=2) + "\n")
