"""Caches of fake pictures and captions, written in a moment."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from engine.data.cache import LatentCacheKey, TextCacheKey
from engine.data.cache_write import write_latent_cache, write_text_cache
from engine.data.sources import Photograph, Source

LATENT_KEY = LatentCacheKey("vae-1", 0.2325, "train2017", 16)
TEXT_KEY = TextCacheKey("clip-1", "train2017")
IDS = [3, 11, 5, 42, 7]
CAPTIONS = {30: "a dog", 10: "two cats on a mat", 21: "x", 55: "a dog on a dog", 8: "one plum here"}


def pixels_of(position: int) -> torch.Tensor:
    return torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(position))


def photographs_in(folder: Path, ids: Sequence[int]) -> list[Photograph]:
    """Files that stand for pictures; those that are there already stay."""
    folder.mkdir(exist_ok=True)
    for position, image_id in enumerate(ids):
        if not (folder / f"{image_id}.png").exists():
            (folder / f"{image_id}.png").write_bytes(bytes([position]))
            os.utime(folder / f"{image_id}.png", ns=(position, position))
    return [Photograph(image_id, folder / f"{image_id}.png", (16, 16)) for image_id in ids]


def loader(photographs: Sequence[Photograph]):
    """The first byte of a file says which picture it is."""

    def load_batches(batches):
        for batch in batches:
            contents = [photographs[position].path.read_bytes() for position in batch]
            statuses = [os.stat(photographs[position].path) for position in batch]
            sources = map(Source.of, contents, statuses, (photographs[position].size for position in batch))
            facts, digests = zip(*(source.to_tensors() for source in sources), strict=True)
            yield torch.stack([pixels_of(content[0]) for content in contents]), torch.stack(facts), torch.stack(digests)

    return load_batches


def fake_moments(pixels: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W] -> [B, 8, H/4, W/4]: not symmetric under flips, as a VAE is not."""
    pooled = torch.nn.functional.avg_pool2d(pixels, 4)
    return torch.cat([pooled, pooled * torch.arange(pooled.shape[-1]), pooled[:, :2].square()], dim=1)


def fake_states(captions):
    return [torch.tensor([[float(len(word)), float(ord(word[0]))] for word in text.split()]) for text in captions]


def write_latents(path, key=LATENT_KEY, ids=IDS, encode=fake_moments, **settings):
    path.mkdir(exist_ok=True)
    photographs = photographs_in(path.parent / "pictures", ids)
    settings = {"batch_size": 2, "shard_size": 2, **settings}
    write_latent_cache(path, key, photographs, loader(photographs), encode, **settings)


def write_texts(path, key=TEXT_KEY, captions=CAPTIONS, encode=fake_states, **settings):
    write_text_cache(path, key, captions, encode, **{"batch_size": 2, "shard_size": 2, **settings})
