"""Computes the latents and text states of a COCO split once, so that training reads them instead of images.

    python -m scripts.cache_latents --coco_root ./data/coco --coco_split train2014 --cached_path ./data/cache/train2014

Writes <cached_path>/latents (both flips of the centre crop, 2 x 32 x 16 x 16 float32 an image at 256 px: 66 kB) and
<cached_path>/text (one state per token, about 25 kB a caption for CLIP ViT-B/32). If interrupted, run it again.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator, Sequence
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
from util.config import parse_checked
from util.images import to_model_range
from util.logging import setup_logging
from util.ranges import nonnegative_int, positive_float, positive_int

logger = logging.getLogger(__name__)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coco_root", required=True, help="folder with annotations/ and the image folders")
    parser.add_argument("--coco_split", default="train2014", help="e.g. train2014, val2017: any split with both jsons")
    parser.add_argument("--cached_path", required=True, help="where to write latents/ and text/; one folder per split")
    parser.add_argument("--vae_path", default="pretrained_models/vae/kl16.ckpt", help="VAE checkpoint (LDM layout)")
    parser.add_argument(
        "--latent_scale", type=positive_float, help="factor of the latents; default: the VAE file's, or MAR's"
    )
    parser.add_argument(
        "--clip_path", default="pretrained_models/clip-vit-base-patch32", help="text encoder (Hugging Face folder)"
    )
    parser.add_argument("--img_size", type=positive_int, default=256, help="side of the centre crop, in pixels")
    parser.add_argument(
        "--batch_size", type=positive_int, default=32, help="images at a time; captions: eight times as many"
    )
    parser.add_argument("--num_workers", type=nonnegative_int, default=4, help="processes that read images")
    parser.add_argument("--device", default="cuda", help="where the VAE and the text encoder run: cuda, cuda:1, cpu")
    parser.add_argument("--no_latents", action="store_true", help="do not cache latents")
    parser.add_argument("--no_text", action="store_true", help="do not cache text states")
    return parser


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


def cache_latents(args: argparse.Namespace, index: CocoIndex) -> None:
    index.require_images()
    codec = LatentCodec.load(args.vae_path, args.device, args.latent_scale)
    images = _CroppedImages(index, args.img_size)

    def load_batches(batches: list[list[int]]) -> DataLoader[Tensor]:
        return DataLoader(images, batch_sampler=batches, num_workers=args.num_workers)

    def encode(pixels: Tensor) -> Tensor:
        return codec.encode(pixels.to(args.device))

    key = LatentCacheKey(codec.id, codec.latent_scale, args.coco_split, args.img_size)
    ids = [image.id for image in index.images]
    with _progress("latents", len(ids)) as on_progress:
        path = Path(args.cached_path) / "latents"
        write_latent_cache(path, key, ids, load_batches, encode, args.batch_size, on_progress=on_progress)


def cache_text(args: argparse.Namespace, index: CocoIndex) -> None:
    encoder = ClipTextEncoder.load(args.clip_path, args.device)
    captions = {
        caption_id: caption
        for image in index.images
        for caption_id, caption in zip(image.caption_ids, image.captions, strict=True)
    }
    key = TextCacheKey(encoder.id, args.coco_split)
    with _progress("captions", len(captions)) as on_progress:
        path = Path(args.cached_path) / "text"
        write_text_cache(path, key, captions, encoder.encode, 8 * args.batch_size, on_progress=on_progress)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_checked(get_parser(), argv)
    if args.no_latents and args.no_text:
        raise SystemExit("--no_latents and --no_text together leave nothing to do")
    setup_logging(None, rank=0)
    try:
        index = CocoIndex.load(args.coco_root, args.coco_split, BoxFilters(), args.img_size)
        with torch.no_grad():
            if not args.no_latents:
                cache_latents(args, index)
            if not args.no_text:
                cache_text(args, index)
    except (ValueError, FileNotFoundError) as error:
        logger.debug("where it was found", exc_info=True)
        raise SystemExit(f"cache_latents: error: {error}") from error
    print(f"done: {args.cached_path}")


if __name__ == "__main__":
    main()
