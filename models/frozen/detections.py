"""What every detector gives and takes: the interface that evaluation and rewards are written against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_V2_Weights

from util.types import Category


@dataclass(frozen=True)
class Detections:
    """What was found in one image, best first. boxes_px: [n, 4] xyxy in pixels; category_ids: [n] the dataset's ids."""

    boxes_px: Tensor
    category_ids: Tensor
    scores: Tensor


@dataclass(frozen=True)
class DetectorSettings:
    """What counts as a detection. The defaults are for AP, which wants nearly every guess together with its score.

    min_score: lower scores are dropped, in [0, 1]. nms_iou: of two boxes of one class that overlap by more than this
    IoU the worse is dropped, in (0, 1]; None keeps the detector's own threshold. max_detections: per image, best first.
    Raises ValueError on values outside these ranges.
    """

    min_score: float = 0.001
    nms_iou: float | None = None
    max_detections: int = 100

    def __post_init__(self) -> None:
        if not 0 <= self.min_score <= 1:
            raise ValueError(f"min_score must be within 0 and 1, got {self.min_score}")
        if self.nms_iou is not None and not 0 < self.nms_iou <= 1:
            raise ValueError(f"nms_iou must be above 0 and at most 1, or None, got {self.nms_iou}")
        if self.max_detections < 1:
            raise ValueError(f"max_detections must be at least 1, got {self.max_detections}")


class BoxDetector(Protocol):
    """A frozen detector. id: the sha256 of its file; categories: what it can find, sorted by id."""

    id: str
    arch: str
    categories: tuple[Category, ...]

    def __call__(self, images: Sequence[Tensor]) -> list[Detections]:
        """images: B tensors [3, H, W] in [0, 1], of any sizes -> B `Detections` in pixels of each, on its device."""
        ...


def fitting_batches(images: Sequence[Tensor]) -> list[list[int]]:
    """Positions of the images that may share a batch, so that none changes what is found in another.

    Unlike sizes never share one: they would be padded to a common size, and that changes the detections. On a CPU every
    image is alone: batches save little there and change the last bits of float32 sums.
    """
    groups: dict[object, list[int]] = {}
    for position, image in enumerate(images):
        key = position if image.device.type == "cpu" else image.shape
        groups.setdefault(key, []).append(position)
    return list(groups.values())


def coco_categories() -> tuple[Category, ...]:
    """COCO's 80 categories by ascending id; ids lie within 1 and 90, ten of them were never used (torchvision: N/A)."""
    names = FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1.meta["categories"]
    return tuple(Category(index, name) for index, name in enumerate(names) if index > 0 and name != "N/A")
