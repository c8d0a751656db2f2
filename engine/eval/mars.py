"""What MARS is worth while it trains, on pictures that it does not train on: losses, pictures of captions, captions of
pictures; in stage III, small pictures made larger, and how near they are to the small ones once they are shrunk. All
with the averaged weights, where there is an average.

Left out: the judge's scores, which are for finished weights (scripts.evaluate_layout measures layouts, which MARS has
not).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from engine.data.coco import CocoLayoutDataset, DataConfig
from engine.data.pairs import low_codes, pairs_of
from engine.data.scenes import text_scene
from engine.data.translations import LANGUAGE, Translations
from engine.sample.generate import batches, image_generator
from engine.sample.grid import scene_grid
from engine.train.mars import MarsState
from engine.train.parallel import unsharded
from models.frozen.codes import CodeCodec
from models.mars.decoding import describe_images
from models.mars.losses import caption_losses, drawing_losses
from models.mars.sampling import DrawOptions, draw_images
from models.mars.words import CaptionWords
from util.buckets import Size
from util.distributed import DistInfo
from util.images import save_png, shrunk_psnr, to_picture
from util.logging import MetricWriter
from util.output import write_text_atomic
from util.rng import derive_seed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """Pictures with a caption each, in one language or two. Losses are measured on those of a split that is not trained
    on; previews alone may be of training pictures, where no other split is named.

    captions: by language, "" for the split's own. codes: [n, L] int64, on the CPU; low: [n, h, w] int64, of the same
    pictures small, for stage III.
    """

    image_ids: Sequence[int]
    codes: Tensor
    captions: Mapping[str, Sequence[str]]
    low: Tensor | None = None

    def __len__(self) -> int:
        return len(self.codes)

    def first(self, count: int) -> HeldOut:
        captions = {name: texts[:count] for name, texts in self.captions.items()}
        low = None if self.low is None else self.low[:count]
        return HeldOut(self.image_ids[:count], self.codes[:count], captions, low)

    def low_of(self, chosen: slice, device: torch.device) -> Tensor | None:
        """[b, l] of some of them, None where there are none."""
        return None if self.low is None else self.low[chosen].flatten(1).to(device)


def held_out_of(
    config: DataConfig, num_images: int, codec: CodeCodec, batch_size: int, low_size: Size | None = None
) -> HeldOut:
    """The first images of a split, each with its first caption, not mirrored. low_size: (height, width) in pixels, if
    they are made larger from that. Raises ValueError if there are fewer."""
    index = replace(config, hflip_prob=0.0, crop="center").load_index()
    if len(index) < num_images:
        raise ValueError(f"{num_images} held-out images were asked for, {index.split} has {len(index)}")
    index = replace(index, images=index.images[:num_images])
    dataset = CocoLayoutDataset(index, replace(config, hflip_prob=0.0, crop="center"))
    own = [image.captions[0] for image in index.images]
    captions: dict[str, Sequence[str]] = {"": own}
    other = Translations.find(index)
    if other is not None:
        captions[LANGUAGE] = [other.of(image.id, image.captions[0]) for image in index.images]
    codes, low = [], []
    for chosen in batches(num_images, batch_size):
        samples = [dataset[item] for item in range(num_images)[chosen]]
        pixels = torch.stack([each.pixels for each in samples if each.pixels is not None])  # [b, 3, H, W]
        pixels = pixels.to(codec.device)  # [b, 3, H, W]
        codes.append(codec.encode(pixels)[:, 0].flatten(1).long().cpu())  # [b, L]
        if low_size is not None:
            low.append(low_codes(codec, pixels, low_size).cpu())  # [b, h, w]
    return HeldOut([image.id for image in index.images], torch.cat(codes), captions, torch.cat(low) if low else None)


@dataclass(frozen=True)
class MarsLook:
    """Weights as a look at them finds them: averaged, in evaluation mode, in the run's precision."""

    state: MarsState
    words: CaptionWords
    precision: str
    dist: DistInfo

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Every process enters, if the model is sharded."""
        device = self.dist.device.type
        self.state.objective.eval()
        with (
            torch.no_grad(),
            self.state.ema.applied(),
            torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16"),
        ):
            yield

    @property
    def is_sharded(self) -> bool:
        return isinstance(self.state.objective, FSDPModule)


@dataclass(frozen=True)
class MarsEvaluation:
    """Called by the loop on every process: the losses of held-out pairs, by language."""

    look: MarsLook
    held_out: HeldOut
    batch_size: int

    def __call__(self, step: int, writer: MetricWriter) -> str | None:
        with self.look.opened(), unsharded(self.look.state.objective):
            found = {name: self.losses(captions) for name, captions in self.held_out.captions.items()}
        values = {
            "_".join(part for part in (f"eval/{name}", language) if part): loss
            for language, losses in found.items()
            for name, loss in losses.items()
        }
        writer.scalars(step, values)
        logger.info("step %d  held out: %s", step, "  ".join(f"{name} {loss:.4f}" for name, loss in values.items()))
        return None

    def losses(self, captions: Sequence[str]) -> dict[str, float]:
        """Means over images, whatever `batch_size` is: of drawing nats a code, of describing, which stage III does not,
        nats a word of the image's own caption."""
        model, device = self.look.state.model, self.look.dist.device
        describes = self.held_out.low is None
        sums = {"drawing": 0.0, "describing": 0.0} if describes else {"drawing": 0.0}
        for chosen in batches(len(self.held_out), self.batch_size):
            codes = self.held_out.codes[chosen].to(device)  # [b, L]
            pairs = pairs_of(codes, captions[chosen], self.look.words, low=self.held_out.low_of(chosen, device))
            sums["drawing"] += drawing_losses(model, pairs)[0].item() * len(codes)  # as many codes in each
            if describes:
                sums["describing"] += caption_losses(model, pairs).sum().item()
        return {name: value / len(self.held_out) for name, value in sums.items()}


@dataclass(frozen=True)
class MarsPreview:
    """Called by the loop on every process (a sharded model needs all of them); rank 0 writes samples/step-N.png, the
    captions drawn in each language, and samples/step-N.txt, the pictures told in words, a line each.

    In stage III the small pictures are made larger and none is told. Written is the PSNR of what is drawn, shrunk, to
    the small picture, beside that of the pictures themselves, all of them decoded codes.
    """

    look: MarsLook
    held_out: HeldOut
    codec: CodeCodec
    options: DrawOptions
    seed: int
    batch_size: int
    folder: Path

    def __call__(self, step: int, writer: MetricWriter) -> None:
        is_main = self.look.dist.is_main
        if not is_main and not self.look.is_sharded:
            return
        with self.look.opened(), unsharded(self.look.state.objective):
            drawn = {name: self.draw(captions) for name, captions in self.held_out.captions.items()}
            told = self.tell() if self.held_out.low is None else []
        if not is_main:
            return
        pixels = {name: [self.codec.decode(each) for each in codes] for name, codes in drawn.items()}
        pictures = [to_picture(each[0]) for decoded in pixels.values() for each in decoded]
        own = self.held_out.captions[""]  # fonts have no Chinese
        scenes = [text_scene(f"{each} ({name})" if name else each) for name in drawn for each in own]
        grid = scene_grid(pictures, scenes)
        path = self.folder / f"step-{step:07d}.png"
        save_png(grid, path)
        writer.image(step, "samples", grid)
        if self.held_out.low is not None:
            self.write_psnr(step, writer, pixels, self.held_out.low)
            return
        told = [" ".join(text.split()) for text in told]  # a line each, whatever is told
        lines = [f"{image_id}\t{text}\n" for image_id, text in zip(self.held_out.image_ids, told, strict=True)]
        write_text_atomic(path.with_suffix(".txt"), "".join(lines))
        first = self.held_out.image_ids[0], told[0]
        logger.info("%d samples at step %d: %s; picture %s: %s", len(pictures), step, path, *first)

    def write_psnr(self, step: int, writer: MetricWriter, drawn: Mapping[str, list[Tensor]], low: Tensor) -> None:
        """drawn: pixels [1, 3, H, W] of each picture, by language; low: [n, h, w]."""
        small = [self.codec.decode(each[None, None].float().to(self.codec.device)) for each in low]
        large = self.held_out.codes.unflatten(1, self.look.state.model.config.grid)  # [n, h, w]
        own = [self.codec.decode(each[None, None].float().to(self.codec.device)) for each in large]
        values = {}
        for name, larger in {**drawn, "pictures": own}.items():
            found = [shrunk_psnr(*each).item() for each in zip(larger, small, strict=True)]
            values["_".join(part for part in ("samples/psnr", name) if part)] = sum(found) / len(found)
        writer.scalars(step, values)
        shown = "  ".join(f"{name} {value:.2f} dB" for name, value in values.items())
        logger.info("%d samples at step %d, shrunk against the small pictures: %s", len(low), step, shown)

    def draw(self, captions: Sequence[str]) -> list[Tensor]:
        """Codes [1, 1, h, w] of each."""
        words, codes = self.look.words, []
        for chosen in batches(len(captions), self.batch_size):
            seeds = [derive_seed(self.seed, "preview", index) for index in range(len(captions))[chosen]]
            drawn = draw_images(
                self.look.state.model, words.prompts(captions[chosen]), words.opening,
                [image_generator(seed) for seed in seeds], self.options,
                self.held_out.low_of(chosen, self.look.dist.device),
            )  # [b, h, w]  # fmt: skip
            codes += list(drawn[:, None].split(1))
        return codes

    def tell(self) -> list[str]:
        """The likeliest caption of each held-out picture."""
        words, device = self.look.words, self.look.dist.device
        told: list[list[int]] = []
        for chosen in batches(len(self.held_out), self.batch_size):
            codes = self.held_out.codes[chosen].to(device)  # [b, L]
            told += describe_images(self.look.state.model, codes, words.opening, [words.end_token], words.max_tokens)
        return [words.text(ids) for ids in told]
