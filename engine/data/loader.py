"""Batches of a dataset for the loop: the same ones for the same (seed, epoch), from any image on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from engine.data.buckets import BucketSampler
from engine.data.classes import ClassDataset
from engine.data.coco import CocoLayoutDataset, ResumableSampler
from util.rng import generator

TrainingDataset = CocoLayoutDataset | ClassDataset


@dataclass(frozen=True)
class LoadedBatches:
    """`Batches` of the loop, read by a DataLoader."""

    dataset: TrainingDataset
    sampler: ResumableSampler
    loader: DataLoader[Any]

    @property
    def num_images(self) -> int:
        return self.sampler.length

    @property
    def global_batch(self) -> int:
        return self.sampler.global_batch

    def of_epoch(self, epoch: int, start: int) -> Iterator[Any]:
        self.dataset.set_epoch(epoch)
        self.sampler.set_epoch(epoch, start)
        return iter(self.loader)


def sampler_of(
    dataset: TrainingDataset, rank: int, world_size: int, seed: int, batch_size: int
) -> ResumableSampler:
    """One process's share of every epoch. Raises ValueError if the dataset is smaller than a global batch."""
    if isinstance(dataset, CocoLayoutDataset) and dataset.config.sizes:
        return BucketSampler(dataset.shapes(), dataset.config.sizes, rank, world_size, seed, batch_size)
    return ResumableSampler(len(dataset), rank, world_size, seed, batch_size)


def load_batches(
    dataset: TrainingDataset,
    sampler: ResumableSampler,
    collate: Callable[[Any], Any],
    num_workers: int,
    pin_memory: bool,
) -> LoadedBatches:
    """collate: a list of the dataset's samples -> a batch."""
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=sampler.batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        generator=generator(sampler.seed, "workers"),  # else the loader would draw from the global generator
    )
    return LoadedBatches(dataset, sampler, loader)
