"""Batches of one size each, for training on several aspect ratios: `ResumableSampler` with buckets.

An epoch's images are those of its permutation. Each belongs to the bucket of its nearest size; a bucket's images fill
global batches in the order of the permutation. What fills no batch of its own bucket is put in line by aspect ratio and
joins the neighbours: every image is seen once, a few in a neighbour's size. The batches are then shuffled. As without
buckets, only the permutation's last images, which fill no global batch, are left out.

Which images the first n of an epoch are depends on the size of the global batch, so a checkpoint keeps with which
sizes the epoch was gone through (`Stretch`). A run that continues with another batch size or number of processes plans
the images that are left anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine.data.coco import BUCKETS, ResumableSampler, SizedItem
from util.buckets import Size, nearest_size, ratio_distance, size_name
from util.read import short_repr
from util.rng import generator



@dataclass(frozen=True)
class Stretch:
    """A part of an epoch, from its image number `first` on, in global batches of `global_batch` images."""

    first: int
    global_batch: int


@dataclass(frozen=True)
class BucketBatch:
    """A global batch: items of the dataset, all of one size."""

    size: Size
    items: tuple[int, ...]


def plan_batches(
    items: Sequence[int], shape_of: Sequence[Size], sizes: Sequence[Size], global_batch: int, rng: torch.Generator
) -> list[BucketBatch]:
    """As many global batches as the items fill, in random order. shape_of: (height, width) of each item's image."""
    used = items[: len(items) // global_batch * global_batch]
    nearest = {shape: nearest_size(*shape, sizes) for shape in {shape_of[item] for item in used}}
    members: dict[Size, list[int]] = {size: [] for size in sizes}
    for item in used:
        members[nearest[shape_of[item]]].append(item)
    full, rest = [], []
    for size in sorted(sizes, key=lambda size: size[1] / size[0]):
        own = members[size]
        whole = len(own) // global_batch * global_batch
        full += [BucketBatch(size, tuple(own[k : k + global_batch])) for k in range(0, whole, global_batch)]
        rest += own[whole:]
    for start in range(0, len(rest), global_batch):
        mixed = rest[start : start + global_batch]
        full.append(BucketBatch(_common_size([nearest[shape_of[item]] for item in mixed]), tuple(mixed)))
    return [full[k] for k in torch.randperm(len(full), generator=rng).tolist()]


def _common_size(wanted: Sequence[Size]) -> Size:
    """The one of these sizes that the others differ least from."""
    counts = Counter(wanted)
    return min(counts, key=lambda size: sum(count * ratio_distance(size, other) for other, count in counts.items()))


class BucketSampler(ResumableSampler):
    """This rank's share of an epoch's batches: `SizedItem`s, batch after batch of one size on all ranks."""

    def __init__(
        self,
        shape_of: Sequence[Size],
        sizes: Sequence[Size],
        rank: int,
        world_size: int,
        seed: int,
        batch_size: int,
    ) -> None:
        """shape_of: (height, width) of each item's image. sizes: of the pictures. Raises ValueError as
        `ResumableSampler`, and for no or repeated sizes."""
        super().__init__(len(shape_of), rank, world_size, seed, batch_size)
        if not sizes or len(set(sizes)) < len(sizes):
            raise ValueError(f"sizes must be different ones, got {', '.join(map(size_name, sizes)) or 'none'}")
        self.shape_of, self.sizes = tuple(shape_of), tuple(sizes)
        self.stretches: tuple[Stretch, ...] = (Stretch(0, self.global_batch),)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """As the base. Raises ValueError if the first `start` images were not seen in whole global batches."""
        before = self.stretches if epoch == self.epoch else (Stretch(0, self.global_batch),)
        before = tuple(each for each in before if each.first < start)
        super().set_epoch(epoch, start)
        if not before or before[-1].global_batch != self.global_batch:
            before = (*before, Stretch(start, self.global_batch))
        ends = [*(each.first for each in before[1:]), start]
        for each, end in zip(before, ends, strict=True):
            if (end - each.first) % each.global_batch:
                raise ValueError(
                    f"image {end} of epoch {epoch} is not the end of a batch of {each.global_batch} images that began "
                    f"at image {each.first}"
                )
        self.stretches = before

    def batches(self) -> list[BucketBatch]:
        """The global batches that are left of the epoch."""
        items = torch.randperm(self.length, generator=generator(self.seed, "order", self.epoch)).tolist()
        planned: list[BucketBatch] = []
        ends = [*(each.first for each in self.stretches[1:]), self.start]
        for stretch, end in zip(self.stretches, ends, strict=True):
            rng = generator(self.seed, "batches", self.epoch, stretch.first)
            planned = plan_batches(items, self.shape_of, self.sizes, stretch.global_batch, rng)
            done = (end - stretch.first) // stretch.global_batch
            seen = {item for batch in planned[:done] for item in batch.items}
            items, planned = [item for item in items if item not in seen], planned[done:]
        return planned

    def __iter__(self) -> Iterator[SizedItem]:
        for batch in self.batches():
            for item in batch.items[self.rank :: self.world_size]:
                yield SizedItem(item, batch.size)

    def state(self) -> dict[str, Any]:
        stretches = [[each.first, each.global_batch] for each in self.stretches]
        return {BUCKETS: {"sizes": [list(size) for size in self.sizes], "epoch": self.epoch, "stretches": stretches}}

    def restore(self, state: Mapping[str, Any], epoch: int, start: int) -> None:
        if start == 0:
            return
        found = state.get(BUCKETS)
        if not isinstance(found, dict) or found.get("sizes") != [list(size) for size in self.sizes]:
            raise ValueError(
                f"image {start} of epoch {epoch} was reached with pictures of other sizes than "
                f"{', '.join(map(size_name, self.sizes))}: sizes can only change between epochs"
            )
        self.epoch, self.stretches = _read_stretches(found)


def _read_stretches(state: Mapping[str, Any]) -> tuple[int, tuple[Stretch, ...]]:
    """The epoch and its stretches. Raises ValueError for what `BucketSampler.state` does not write."""
    epoch, listed = state.get("epoch"), state.get("stretches")
    rows = listed if isinstance(listed, list) else []
    is_known = all(isinstance(row, list) and len(row) == 2 and type(row[0]) is type(row[1]) is int for row in rows)
    read = tuple(Stretch(*row) for row in rows) if is_known else ()
    firsts = [each.first for each in read]
    is_rising = firsts[:1] == [0] and firsts == sorted(set(firsts))
    if type(epoch) is not int or not is_rising or min(each.global_batch for each in read) < 1:
        raise ValueError(
            f"{BUCKETS} must hold an epoch and its stretches [first image, images of a batch] from image 0 on, got "
            f"epoch {short_repr(epoch)} and stretches {short_repr(listed)}"
        )
    return epoch, read
