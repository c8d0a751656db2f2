"""From parsed arguments to the caches of a split (scripts/cache_latents.py)."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from engine.data.cache import LatentCacheKey, TextCacheKey
from engine.data.cache_write import CropBatch, Progress, Share, write_latent_cache, write_text_cache
from engine.data.check import check_pictures
from engine.data.classes import SPLIT, ClassIndex
from engine.data.sources import Photograph, Source, photographs_of
from models.frozen.base import ImageCodec
from models.frozen.codec import load_codec
from models.frozen.encoder import CaptionEncoder, load_text_encoder
from util.boxes import plan_center_crop
from util.coco import BoxFilters, CocoIndex
from util.distributed import DistInfo, barrier, failing_together, init_distributed, shutdown
from util.images import crop_image, to_model_range
from util.logging import progress, setup_logging
from util.output import held_folder
from util.picture_files import decode_image, read_image_bytes, require_size

logger = logging.getLogger(__name__)

MAX_CACHED_CHANNELS = 1024
ALL_BOXES = BoxFilters(
    min_visibility=0, keep_crowd=True, unknown="phrase"
)  # latents and captions do not depend on them


def cache_split(args: argparse.Namespace) -> list[str]:
    """Computes what is not cached yet, or looks at the data alone (--check_data). Several processes share the work.

    Returns what is to be said at the end, by the first of them. Raises FileNotFoundError or ValueError for inputs that
    are missing or wrong, before anything is encoded.
    """
    dist = init_distributed(args.device)
    setup_logging(None, dist.rank)
    with held_folder(args.cached_path) if dist.is_main and not args.check_data else nullcontext(), torch.no_grad():
        said = _cache_classes(args, dist) if args.class_root else _cache_coco(args, dist)
        barrier()
    shutdown()
    return said if dist.is_main else []


def _cache_coco(args: argparse.Namespace, dist: DistInfo) -> list[str]:
    """Latents and text states of a split of COCO."""
    index = CocoIndex.load(args.coco_root, args.coco_split, ALL_BOXES, args.img_size)
    said = [f"{len(index)} images and {len(index.captions())} captions of {index.split}: their entries are in order"]
    if args.latents:
        said.append(_check_images(index, dist))
    codec = load_codec(args.vae_path, dist.device, args.latent_scale) if args.latents else None
    encoder = load_text_encoder(args.clip_path, dist.device, args.max_text_tokens) if args.text else None
    if encoder is not None:
        logger.info("%s", text_cache_size(encoder, args.clip_path, list(index.captions().values())))
    if not args.check_data:
        if codec is not None:
            named_in = index.named_in
            cache_latents(args, photographs_of(index), index.split, named_in, codec, dist)
        if encoder is not None:
            cache_text(args, index, encoder, dist)
        said = [f"done: {args.cached_path}"]
    return said


def _cache_classes(args: argparse.Namespace, dist: DistInfo) -> list[str]:
    """Latents of a folder of classes."""
    index = ClassIndex.load(args.class_root)
    photographs = index.photographs()
    with failing_together():
        said = [check_pictures(photographs, None) if dist.is_main else ""]
    if not args.check_data:
        codec = load_codec(args.vae_path, dist.device, args.latent_scale)
        cache_latents(args, photographs, SPLIT, "", codec, dist)
        said = [f"done: {args.cached_path}"]
    return said


def _check_images(index: CocoIndex, dist: DistInfo) -> str:
    index.require_images()
    with failing_together():
        return check_pictures(photographs_of(index), index.named_in) if dist.is_main else ""


class _Crops(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Centre crops [3, H, W] in [-1, 1], by position, each with the facts and the digest of its file."""

    def __init__(self, photographs: Sequence[Photograph], img_size: int, named_in: str) -> None:
        self.photographs = photographs
        self.img_size = img_size
        self.named_in = named_in

    def __len__(self) -> int:
        return len(self.photographs)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, Tensor]:
        photograph = self.photographs[position]
        status, content = os.stat(photograph.path), read_image_bytes(photograph.path)
        image = decode_image(content, photograph.path)
        if photograph.size is not None:
            require_size(photograph.path, image, photograph.size, self.named_in)
        crop = plan_center_crop(*image.size, self.img_size)
        source = Source.of(content, status, image.size)
        return to_model_range(crop_image(image, crop)), *source.to_tensors()


@contextmanager
def _progress(description: str, dist: DistInfo) -> Iterator[Progress]:
    """A bar with rate and ETA for what this process does; what was there before does not count as speed."""
    with progress(total=0, desc=description, unit="item", rank=dist.rank) as bar:

        def advance_to(done: int, total: int) -> None:
            if not bar.total:
                bar.total, bar.initial, bar.n = total, done, done
            bar.update(done - bar.n)
            bar.refresh()

        yield advance_to


def cache_latents(
    args: argparse.Namespace,
    photographs: Sequence[Photograph],
    split: str,
    named_in: str,
    codec: ImageCodec,
    dist: DistInfo,
) -> None:
    """named_in: what states the sizes of the photographs, if anything does, for messages."""
    crops = _Crops(photographs, args.img_size, named_in)

    def load_batches(batches: list[list[int]]) -> DataLoader[CropBatch]:
        return DataLoader(crops, batch_sampler=batches, num_workers=args.num_workers)

    def encode(pixels: Tensor) -> Tensor:
        return codec.encode(pixels.to(dist.device))

    key = LatentCacheKey(codec.id, codec.latent_scale, split, args.img_size, codebook_size=codec.codebook_size)
    with _progress("latents", dist) as on_progress:
        path = Path(args.cached_path) / "latents"
        write_latent_cache(
            path, key, photographs, load_batches, encode, args.batch_size, on_progress=on_progress, share=_share(dist)
        )


def cache_text(args: argparse.Namespace, index: CocoIndex, encoder: CaptionEncoder, dist: DistInfo) -> None:
    key = TextCacheKey(encoder.id, args.coco_split, encoder.stated_cut)
    with _progress("captions", dist) as on_progress:
        path = Path(args.cached_path) / "text"
        write_text_cache(
            path,
            key,
            index.captions(),
            encoder.encode,
            8 * args.batch_size,
            on_progress=on_progress,
            share=_share(dist),
        )


def text_cache_size(encoder: CaptionEncoder, path: str, captions: Sequence[str]) -> str:
    """How large the text states of these captions will be, by the lengths of some of them, for the log.

    Raises ValueError for states of more than `MAX_CACHED_CHANNELS`, naming the folder at `path`.
    """
    some = captions[:: max(1, len(captions) // 1000)]
    tokens = sum(map(len, encoder.tokenize(some))) / max(1, len(some))
    gigabytes = len(captions) * tokens * encoder.dim * 4 / 1e9
    size = (
        f"{len(captions)} captions of {tokens:.0f} tokens by {encoder.dim} channels: {gigabytes:.2g} GB of text states"
    )
    if encoder.dim > MAX_CACHED_CHANNELS:
        raise ValueError(
            f"--text_encoder {path}: {size}. Up to {MAX_CACHED_CHANNELS} channels are cached; with --no-text, training "
            "encodes captions as it goes"
        )
    return size


def _share(dist: DistInfo) -> Share:
    return Share(dist.rank, dist.world_size)
