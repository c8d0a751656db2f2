"""From parsed arguments to the caches of a split (scripts/cache_latents.py)."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from engine.data.cache import LatentCacheKey, TextCacheKey, write_latent_cache, write_text_cache
from engine.data.coco import read_crop
from models.frozen.text import ClipTextEncoder
from models.frozen.vae import LatentCodec
from util.boxes import plan_center_crop
from util.coco import BoxFilters, CocoIndex
from util.distributed import init_distributed, shutdown
from util.images import to_model_range
from util.logging import setup_logging


def cache_split(args: argparse.Namespace) -> None:
    """Computes what is not cached yet. Raises ValueError or FileNotFoundError for inputs that are missing or wrong."""
    setup_logging(None, rank=0)
    device = init_distributed(args.device).device
    try:
        index = CocoIndex.load(args.coco_root, args.coco_split, BoxFilters(), args.img_size)
        with torch.no_grad():
            if not args.no_latents:
                cache_latents(args, index, device)
            if not args.no_text:
                cache_text(args, index, device)
    finally:
        shutdown()


class _CroppedImages(Dataset[Tensor]):
    """Centre crops [3, H, W] in [-1, 1], by position in the index."""

    def __init__(self, index: CocoIndex, img_size: int) -> None:
        self.index = index
        self.img_size = img_size

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> Tensor:
        image = self.index.images[position]
        crop = plan_center_crop(image.width, image.height, self.img_size)
        return to_model_range(read_crop(self.index, position, crop))


@contextmanager
def _progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with rate and ETA; what was there before this run does not count as speed."""
    started: list[int] = []
    with tqdm(total=total, desc=description, unit="item") as bar:

        def advance_to(done: int) -> None:
            if not started:
                started.append(done)
                bar.initial = bar.n = done
            bar.update(done - bar.n)
            bar.refresh()

        yield advance_to


def cache_latents(args: argparse.Namespace, index: CocoIndex, device: torch.device) -> None:
    index.require_images()
    codec = LatentCodec.load(args.vae_path, device, args.latent_scale)
    images = _CroppedImages(index, args.img_size)

    def load_batches(batches: list[list[int]]) -> DataLoader[Tensor]:
        return DataLoader(images, batch_sampler=batches, num_workers=args.num_workers)

    def encode(pixels: Tensor) -> Tensor:
        return codec.encode(pixels.to(device))

    key = LatentCacheKey(codec.id, codec.latent_scale, args.coco_split, args.img_size)
    ids = [image.id for image in index.images]
    with _progress("latents", len(ids)) as on_progress:
        path = Path(args.cached_path) / "latents"
        write_latent_cache(path, key, ids, load_batches, encode, args.batch_size, on_progress=on_progress)


def cache_text(args: argparse.Namespace, index: CocoIndex, device: torch.device) -> None:
    encoder = ClipTextEncoder.load(args.clip_path, device)
    captions = {
        caption_id: caption
        for image in index.images
        for caption_id, caption in zip(image.caption_ids, image.captions, strict=True)
    }
    key = TextCacheKey(encoder.id, args.coco_split)
    with _progress("captions", len(captions)) as on_progress:
        path = Path(args.cached_path) / "text"
        write_text_cache(path, key, captions, encoder.encode, 8 * args.batch_size, on_progress=on_progress)
