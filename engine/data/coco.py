"""COCO images as training samples: one caption, one crop and one flip per image and epoch, applied to pixels and boxes.

Every draw is keyed by (seed, epoch, image id, caption id), so a sample does not depend on workers, ranks, batch size or
order; `ResumableSampler` fixes the order by (seed, epoch), so an interrupted epoch continues at its next batch.

Captions that say left or right are not flipped: the flip would make them false.

Shape letters: B batch, N boxes (max), T text tokens, C channels, n boxes of one image, t tokens of one caption.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from engine.data.cache import LatentCache, TextCache
from engine.data.phrases import draw_phrases, names_a_side, own_phrases
from util.boxes import CROP_MODES, Crop, CropMode, flip_boxes, plan_center_crop, plan_random_crop
from util.buckets import Size, nearest_size
from util.coco import BoxFilters, CocoImage, CocoIndex, fit_boxes
from util.images import crop_image, load_image, to_model_range
from util.picture_files import require_size
from util.rng import generator
from util.types import UNKNOWN, Layout, LayoutBatch, SizeBatch, TextContext

logger = logging.getLogger(__name__)

CaptionMode = Literal["random", "all"]
CAPTION_MODES: tuple[CaptionMode, ...] = get_args(CaptionMode)
BUCKETS = "buckets"  # an entry of checkpoints, see `engine/data/buckets.py`

@dataclass(frozen=True)
class DataConfig:
    """Which images, how they are cropped and flipped, which boxes stay (see `BoxFilters` for units).

    caption_mode: "random" draws one caption per image and epoch; "all" makes each caption an item of its own.
    sizes: (height, width) that pictures may have, each the nearest one; none: squares of `img_size`. phrase_prob: of a box
    being given by its phrase (`phrases.py`). has_phrases: whether the model knows boxes by words, so that a sidecar's
    label that is no category is a phrase.
    """

    coco_root: str
    split: str
    img_size: int = 256
    crop: CropMode = "center"
    hflip_prob: float = 0.5
    caption_mode: CaptionMode = "random"
    max_objects: int = 16
    min_area: float = 0.0
    min_visibility: float = 0.2
    keep_crowd: bool = False
    drop_empty: bool = False
    seed: int = 0
    sizes: tuple[Size, ...] = ()
    phrase_prob: float = 0.0
    has_phrases: bool = False

    def __post_init__(self) -> None:
        if self.crop not in CROP_MODES:
            raise ValueError(f"crop must be one of {CROP_MODES}, got {self.crop!r}")
        if self.caption_mode not in CAPTION_MODES:
            raise ValueError(f"caption_mode must be one of {CAPTION_MODES}, got {self.caption_mode!r}")
        for name in ("hflip_prob", "phrase_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.img_size < 1:
            raise ValueError(f"img_size must be positive, got {self.img_size}")

    @property
    def filters(self) -> BoxFilters:
        rules = (self.min_area, self.min_visibility, self.max_objects, self.keep_crowd, self.drop_empty)
        return BoxFilters(*rules, unknown="phrase" if self.has_phrases else "refuse")

    def load_index(self) -> CocoIndex:
        return CocoIndex.load(self.coco_root, self.split, self.filters, self.img_size, self.sizes)


@dataclass(frozen=True)
class SizedItem:
    """An item of the dataset, and the (height, width) that its picture is to have."""

    item: int
    size: Size


@dataclass(frozen=True)
class Sample:
    """One image with one caption. Either pixels [3, H, W] in [-1, 1] or moments [2C, h, w] (from a cache) are there, or
    neither in a dataset without images.

    crop: of the image, before the flip. text_states: [t, C] from a cache, or None where the caption is still to be
    encoded.
    """

    image_id: int
    caption: str
    caption_id: int
    crop: Crop
    is_flipped: bool
    layout: Layout
    pixels: Tensor | None = None
    moments: Tensor | None = None
    text_states: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """pixels: [B, 3, H, W] in [-1, 1], or moments: [B, 2C, h, w], or neither (captions and layouts alone). sizes: of
    the images and what was cut out of them. text: None where captions are still to be encoded. phrases: those of the
    layout's boxes, per image, still to be encoded; () for an image without any."""

    image_ids: list[int]
    captions: list[str]
    layout: LayoutBatch
    sizes: SizeBatch
    pixels: Tensor | None = None
    moments: Tensor | None = None
    text: TextContext | None = None
    phrases: tuple[tuple[str, ...], ...] = ()

    def to(self, device: torch.device | str) -> Batch:
        """Copies in the background where the batch is pinned and the device is a GPU."""
        background = torch.device(device).type == "cuda"
        return self._map(lambda tensor: tensor.to(device, non_blocking=background))

    def pin_memory(self) -> Batch:
        """Called by a DataLoader with pin_memory=True."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        text = self.text
        return Batch(
            image_ids=self.image_ids,
            captions=self.captions,
            layout=self.layout.map(change),
            sizes=SizeBatch(change(self.sizes.values)),
            pixels=None if self.pixels is None else change(self.pixels),
            moments=None if self.moments is None else change(self.moments),
            text=None if text is None else TextContext(change(text.tokens), change(text.valid), change(text.pooled)),
            phrases=self.phrases,
        )

    def __len__(self) -> int:
        return len(self.image_ids)


def collate(max_objects: int) -> Callable[[Sequence[Sample]], Batch]:
    """A DataLoader's collate_fn: pads layouts to `max_objects` slots and captions to the longest of the batch."""
    return functools.partial(_collate, max_objects)


def _collate(max_objects: int, samples: Sequence[Sample]) -> Batch:
    states = [sample.text_states for sample in samples if sample.text_states is not None]
    return Batch(
        image_ids=[sample.image_id for sample in samples],
        captions=[sample.caption for sample in samples],
        layout=LayoutBatch.collate([sample.layout for sample in samples], max_objects),
        sizes=SizeBatch.of([size_values(sample.crop, sample.is_flipped) for sample in samples]),
        pixels=_stack([sample.pixels for sample in samples]),
        moments=_stack([sample.moments for sample in samples]),
        text=TextContext.collate(states) if states else None,
        phrases=tuple(sample.layout.phrases for sample in samples),
    )


def size_values(crop: Crop, is_flipped: bool) -> tuple[int, ...]:
    """What `SizeBatch` holds of an image: of the picture as the model sees it, flipped or not."""
    (height, width), (source_width, source_height) = crop.size, crop.source
    left = crop.resized[0] - width - crop.x0 if is_flipped else crop.x0
    return height, width, source_height, source_width, crop.y0, left


def _stack(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    assert len(present) in (0, len(tensors)), "all samples of a dataset carry the same fields"
    return torch.stack(present) if present else None


class CocoLayoutDataset(Dataset[Sample]):
    """Map-style: item k of the current epoch, in its nearest size or in the one that a `SizedItem` names. `set_epoch`
    also reaches running workers (shared memory)."""

    def __init__(
        self,
        index: CocoIndex,
        config: DataConfig,
        latents: LatentCache | None = None,
        texts: TextCache | None = None,
        has_images: bool = True,
        sided: Container[tuple[int, str]] = (),
    ) -> None:
        """has_images: False reads captions and layouts alone. sided: further (image id, caption) that are not flipped.

        Raises FileNotFoundError if images are needed and missing, ValueError if config, index and caches differ.
        """
        if index.split != config.split or index.filters != config.filters:
            raise ValueError(
                f"the index is of {index.split}, {index.filters}; asked for {config.split}, {config.filters}"
            )
        if not has_images:
            latents = None
        elif latents is None:
            index.require_images()
        else:
            _check_latents(latents, index, config)
        if texts is not None:
            texts.require(index.captions())
        self.index = index
        self.config = config
        self.latents, self.texts = latents, texts
        self.has_images, self.sided = has_images, sided
        counts = [len(image.captions) if config.caption_mode == "all" else 1 for image in index.images]
        self._first_items = np.concatenate([[0], np.cumsum(counts)])
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @classmethod
    def from_config(
        cls, config: DataConfig, latents: LatentCache | None = None, texts: TextCache | None = None
    ) -> CocoLayoutDataset:
        return cls(config.load_index(), config, latents, texts)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return int(self._first_items[-1])

    def shapes(self) -> list[Size]:
        """(height, width) of each item's image."""
        images = [self.index.images[self._position(item)] for item in range(len(self))]
        return [(image.height, image.width) for image in images]

    def _position(self, item: int) -> int:
        return int(np.searchsorted(self._first_items, item, side="right")) - 1

    def __getitem__(self, item: int | SizedItem) -> Sample:
        item, size = (item, None) if isinstance(item, int) else (item.item, item.size)
        if not 0 <= item < len(self):
            raise IndexError(f"item {item} of {len(self)}")
        position = self._position(item)
        image = self.index.images[position]
        chosen = self._choose_caption(image, item - int(self._first_items[position]))
        caption, caption_id = image.captions[chosen], image.caption_ids[chosen]
        crop = self._plan_crop(image, caption_id, size)
        is_flipped = self._is_flipped(image, caption, caption_id)
        pixels = self._pixels(position, crop, is_flipped) if self.has_images and self.latents is None else None
        moments = self.latents.moments(image.id, is_flipped) if self.latents is not None else None
        states = self.texts.states(caption_id, caption) if self.texts is not None else None
        layout = self._layout(image, caption_id, crop, is_flipped)
        return Sample(image.id, caption, caption_id, crop, is_flipped, layout, pixels, moments, states)

    def _draw(self, purpose: str, *ids: int) -> torch.Generator:
        return generator(self.config.seed, "data", purpose, int(self._epoch), *ids)

    def _choose_caption(self, image: CocoImage, offset: int) -> int:
        if self.config.caption_mode == "all":
            return offset
        return int(torch.randint(len(image.captions), (), generator=self._draw("caption", image.id)))

    def _plan_crop(self, image: CocoImage, caption_id: int, size: Size | None) -> Crop:
        sizes, side = self.config.sizes, self.config.img_size
        size = size or (nearest_size(image.height, image.width, sizes) if sizes else (side, side))
        if self.config.crop == "center":
            return plan_center_crop(image.width, image.height, size)
        return plan_random_crop(image.width, image.height, size, self._draw("crop", image.id, caption_id))

    def _is_flipped(self, image: CocoImage, caption: str, caption_id: int) -> bool:
        said = (caption, *image.phrases) if self._tells_phrases(image) else (caption,)
        if (image.id, caption) in self.sided or any(names_a_side(text) for text in said):
            return False
        return torch.rand((), generator=self._draw("flip", image.id, caption_id)).item() < self.config.hflip_prob

    def _tells_phrases(self, image: CocoImage) -> bool:
        """Whether some box of the image may be, or has to be, given by its phrase."""
        return self.config.phrase_prob > 0 or bool((image.categories == UNKNOWN).any())

    def _layout(self, image: CocoImage, caption_id: int, crop: Crop, is_flipped: bool) -> Layout:
        if not self._tells_phrases(image):
            return make_layout(image, crop, is_flipped, self.index.filters)
        phrases = own_phrases(image, self.index.categories)
        layout = make_layout(image, crop, is_flipped, self.index.filters, phrases)
        return draw_phrases(layout, self.config.phrase_prob, self._draw("phrase", image.id, caption_id))

    def _pixels(self, position: int, crop: Crop, is_flipped: bool) -> Tensor:
        return to_model_range(read_crop(self.index, position, crop, is_flipped))


def read_crop(index: CocoIndex, position: int, crop: Crop, is_flipped: bool = False) -> np.ndarray:
    """uint8 [H, W, 3]. Raises ValueError naming the file if it is unreadable or not of the size the json states."""
    path = index.image_path(position)
    image = load_image(path)
    require_size(path, image, crop.source, index.named_in)
    picture = crop_image(image, crop)
    return picture[:, ::-1] if is_flipped else picture


def make_layout(
    image: CocoImage, crop: Crop, is_flipped: bool, filters: BoxFilters, phrases: Sequence[str] = ()
) -> Layout:
    """The boxes that the model is given with this crop of the image, largest first. phrases: of the image's boxes; ()
    leaves them out."""
    fitted = fit_boxes(image.boxes_px, crop, filters)
    boxes_xyxy = flip_boxes(fitted.boxes_xyxy) if is_flipped else fitted.boxes_xyxy
    kept_phrases = tuple(phrases[place] for place in fitted.kept) if phrases else ()
    if not any(kept_phrases):
        kept_phrases = ()
    categories = torch.from_numpy(image.categories[fitted.kept])
    return Layout(torch.from_numpy(boxes_xyxy).float(), categories, kept_phrases)


def _check_latents(latents: LatentCache, index: CocoIndex, config: DataConfig) -> None:
    if config.crop != latents.crop:
        raise ValueError(
            f"{latents.path} holds latents of the {latents.crop!r} crop, but crop={config.crop!r} was asked for: "
            "use that crop, or train from images"
        )
    if config.sizes:
        raise ValueError(
            f"{latents.path} holds latents of squares of {latents.img_size} px, pictures of {len(config.sizes)} sizes "
            "were asked for: train from images, and cache captions alone (scripts.cache_latents --no-latents)"
        )
    if (latents.split, latents.img_size) != (config.split, config.img_size):
        raise ValueError(
            f"{latents.path} holds {latents.split} at {latents.img_size} px, "
            f"but {config.split} at {config.img_size} px was asked for"
        )
    latents.require(image.id for image in index.images)


class ResumableSampler(Sampler[Any]):
    """This rank's share of one permutation of `length` items, which (seed, epoch) fix for all ranks.

    Global batch k is the k-th run of world_size * batch_size of the items left to see, dealt to the ranks in turns;
    what does not fill a last global batch is left out. Use with DataLoader(batch_size=batch_size).
    """

    def __init__(self, length: int, rank: int, world_size: int, seed: int, batch_size: int) -> None:
        """Raises ValueError if the items do not fill one global batch, or rank is not one of world_size."""
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, {world_size}), got {rank}")
        if length < world_size * batch_size:
            raise ValueError(
                f"the dataset has {length} items, fewer than one global batch of {world_size * batch_size} "
                f"({world_size} ranks x batch_size {batch_size})"
            )
        self.length = length
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.batch_size = batch_size
        self.epoch = 0
        self.start = 0

    @property
    def global_batch(self) -> int:
        """Items of a batch of all ranks together."""
        return self.world_size * self.batch_size

    @property
    def num_batches(self) -> int:
        """Batches that are left of the epoch, on every rank."""
        return (self.length - self.start) // self.global_batch

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """start: how many items of this epoch are done already, by all ranks together, in batches of whatever size.
        Raises ValueError if there are not so many."""
        if not 0 <= start <= self.length:
            raise ValueError(f"start must lie in [0, {self.length}], got {start}")
        self.epoch = epoch
        self.start = start

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds besides the position."""
        return {}

    def restore(self, state: Mapping[str, Any], epoch: int, start: int) -> None:
        """state: of the checkpoint that is continued after `start` images of `epoch`. Raises ValueError if these were
        seen in another order."""
        if start and BUCKETS in state:
            raise ValueError(
                f"image {start} of epoch {epoch} was reached with pictures of several sizes: sizes can only change "
                "between epochs"
            )

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(self.length, generator=generator(self.seed, "order", self.epoch))
        used = order[self.start : self.start + self.num_batches * self.global_batch]
        yield from used[self.rank :: self.world_size].tolist()

    def __len__(self) -> int:
        return self.num_batches * self.batch_size
