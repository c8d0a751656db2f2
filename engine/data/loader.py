"""Batches of COCO samples for the loop: the same ones for the same (seed, epoch), from any image on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.utils.data import DataLoader

from engine.data.coco import Batch, CocoLayoutDataset, ResumableSampler, Sample, collate
from util.rng import generator


@dataclass(frozen=True)
class CocoBatches:
    dataset: CocoLayoutDataset
    sampler: ResumableSampler
    loader: DataLoader[Sample]

    @property
    def num_images(self) -> int:
        return self.sampler.length

    @property
    def global_batch(self) -> int:
        return self.sampler.global_batch

    def of_epoch(self, epoch: int, start: int) -> Iterator[Batch]:
        self.dataset.set_epoch(epoch)
        self.sampler.set_epoch(epoch, start)
        return iter(self.loader)


def coco_batches(
    dataset: CocoLayoutDataset, sampler: ResumableSampler, max_objects: int, num_workers: int, pin_memory: bool
) -> CocoBatches:
    loader = DataLoader(
        dataset,
        batch_size=sampler.batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate(max_objects),
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        generator=generator(sampler.seed, "workers"),  # else the loader would draw from the global generator
    )
    return CocoBatches(dataset, sampler, loader)
