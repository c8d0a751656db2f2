"""Pictures with a class each, from folders as ImageNet has them: <root>/train/<class>/*.JPEG.

Label k stands for the k-th folder in the order of its names, as torchvision counts, so that labels of ImageNet are
those of MAR's weights. As with COCO (`coco.py`), every draw is keyed by (seed, epoch, image), and image k is the k-th picture
in the order of classes and file names.

Shape letters: B batch, C latent channels, h x w latent cells.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from engine.data.cache import LatentCache
from engine.data.sources import Photograph
from util.boxes import CROP_MODES, CropMode, plan_center_crop, plan_random_crop
from util.images import crop_image, to_model_range
from util.picture_files import SUFFIXES, load_image
from util.read import short_path, short_repr
from util.rng import generator

logger = logging.getLogger(__name__)

SPLIT = "train"


@dataclass(frozen=True)
class ClassIndex:
    """What the folders hold. classes: their names. files: names of the pictures, class by class. labels: [n] int64."""

    folder: Path
    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: np.ndarray

    @staticmethod
    def load(root: str | Path) -> ClassIndex:
        """Lists the folders; no picture is opened. Files that are no pictures by their names are counted in the log.

        Raises FileNotFoundError or ValueError naming a folder that is missing or has nothing inside.
        """
        folder = Path(root) / SPLIT
        if not folder.is_dir():
            raise FileNotFoundError(f"class folder {short_path(folder)} not found: it holds a folder for each class")
        classes = tuple(sorted(entry.name for entry in _entries(folder) if entry.is_dir()))
        if not classes:
            raise ValueError(f"{short_path(folder)} holds no folder: each class needs one")
        files: list[str] = []
        counts: list[int] = []
        others: list[str] = []
        for name in classes:
            found = sorted(entry.name for entry in _entries(folder / name))
            pictures = [each for each in found if each.lower().endswith(SUFFIXES)]
            others += [f"{name}/{each}" for each in found if not each.lower().endswith(SUFFIXES)]
            if not pictures:
                raise ValueError(f"class folder {short_path(folder / name)} holds no picture ({', '.join(SUFFIXES)})")
            files += pictures
            counts.append(len(pictures))
        if others:
            logger.info("%s: %d entries are no pictures and left out, %s first", folder, len(others), others[0])
        return ClassIndex(folder, classes, tuple(files), np.repeat(np.arange(len(classes)), counts))

    def image_path(self, position: int) -> Path:
        return self.folder / self.classes[self.labels[position]] / self.files[position]

    def photographs(self) -> list[Photograph]:
        """All pictures; nothing states their sizes."""
        return [Photograph(position, self.image_path(position), None) for position in range(len(self))]

    def require_class_num(self, class_num: int) -> None:
        """Raises ValueError naming both numbers unless the model has as many classes."""
        if class_num != len(self.classes):
            raise ValueError(
                f"the model has {class_num} classes, {short_path(self.folder)} {len(self.classes)} folders: "
                f"--class_num {len(self.classes)} for these"
            )

    def __len__(self) -> int:
        return len(self.files)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """All but hidden ones. Raises ValueError naming the folder if it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise ValueError(f"class folder {short_path(folder)} cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class ClassSample:
    """pixels: [3, H, W] in [-1, 1]; or moments [2C, h, w] or codes [1, h, w], as `LatentCache.moments` gives them."""

    image_id: int
    label: int
    pixels: Tensor | None = None
    moments: Tensor | None = None


@dataclass(frozen=True)
class ClassBatch:
    """Images with class labels [B] int64; pixels [B, 3, H, W] or moments [B, 2C, h, w]."""

    image_ids: list[int]
    labels: Tensor
    pixels: Tensor | None = None
    moments: Tensor | None = None

    @staticmethod
    def collate(samples: Sequence[ClassSample]) -> ClassBatch:
        """A DataLoader's collate_fn."""
        ids, labels = [sample.image_id for sample in samples], torch.tensor([sample.label for sample in samples])
        pixels = [sample.pixels for sample in samples if sample.pixels is not None]
        moments = [sample.moments for sample in samples if sample.moments is not None]
        return ClassBatch(
            ids, labels, torch.stack(pixels) if pixels else None, torch.stack(moments) if moments else None
        )

    def pin_memory(self) -> ClassBatch:
        """Called by a DataLoader with pin_memory=True."""
        parts = (None if each is None else each.pin_memory() for each in (self.pixels, self.moments))
        return ClassBatch(self.image_ids, self.labels.pin_memory(), *parts)

    def __len__(self) -> int:
        return len(self.image_ids)


class ClassDataset(Dataset[ClassSample]):
    """Map-style: item k of the current epoch. `set_epoch` also reaches running workers (shared memory)."""

    def __init__(
        self,
        index: ClassIndex,
        img_size: int,
        crop: CropMode,
        hflip_prob: float,
        seed: int,
        latents: LatentCache | None = None,
    ) -> None:
        """latents: of all pictures at `img_size`, by their numbers; no picture is read then.

        Raises ValueError for another crop than these have, and if they lack a picture.
        """
        if crop not in CROP_MODES:
            raise ValueError(f"crop must be one of {CROP_MODES}, got {short_repr(crop)}")
        if latents is not None:
            if (latents.img_size, latents.crop) != (img_size, crop):
                raise ValueError(
                    f"{latents.path} holds latents of the {latents.crop!r} crop at {latents.img_size} px, asked for "
                    f"are {crop!r} at {img_size} px"
                )
            latents.require(range(len(index)))
        self.latents = latents
        self.index = index
        self.img_size = img_size
        self.crop = crop
        self.hflip_prob = hflip_prob
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int) -> ClassSample:
        if not 0 <= item < len(self):
            raise IndexError(f"item {item} of {len(self)}")
        label = int(self.index.labels[item])
        is_flipped = torch.rand((), generator=self._draw("flip", item)).item() < self.hflip_prob
        if self.latents is not None:
            return ClassSample(item, label, moments=self.latents.moments(item, is_flipped))
        image = load_image(self.index.image_path(item))
        if self.crop == "center":
            crop = plan_center_crop(*image.size, self.img_size)
        else:
            crop = plan_random_crop(*image.size, self.img_size, self._draw("crop", item))
        picture = crop_image(image, crop)
        return ClassSample(item, label, to_model_range(picture[:, ::-1] if is_flipped else picture))

    def _draw(self, purpose: str, item: int) -> torch.Generator:
        return generator(self.seed, "data", purpose, int(self._epoch), item)
