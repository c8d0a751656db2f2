"""The training loss of a frozen Faster R-CNN as a function of pictures, with gradients to their pixels.

    loss_objectness      binary cross-entropy of anchors, boxes wanted or background
    loss_rpn_box_reg     L1 of the offsets of wanted anchors
    loss_classifier      cross-entropy of the labels of regions
    loss_box_reg         L1 of the offsets of wanted regions

The network computes its losses while every layer stays as it is in evaluation: BatchNorm keeps its statistics, nothing
is dropped. torchvision draws the anchors and regions that count from the global generator; it is seeded here and put
back after. Regions are proposals that torchvision takes out of the graph: their corners have no gradient, their labels
and offsets have. A wanted box is among its picture's regions, so an object that no proposal finds is still asked for.

Left out: ONNX files, which have no gradients.

Shape letters: B pictures, n boxes of one, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN

from models.frozen.faster_rcnn import Detector
from util.types import Category

LOSSES = ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")


class DetectorLoss:
    """categories: the dataset's. labels: [categories] int64, the detector's label of each.

    Raises ValueError naming the categories that the detector does not know.
    """

    def __init__(self, detector: Detector, categories: Sequence[Category]) -> None:
        own_id = {category.name: category.id for category in detector.categories}
        unknown = [category.name for category in categories if category.name not in own_id]
        if unknown:
            raise ValueError(f"the detector ({detector.arch}) cannot reward {', '.join(unknown)}: unknown to it")
        label_of_id = {own: label for label, own in enumerate(detector.category_ids.tolist()) if own}
        self.model, self.id, self.arch = detector.model, detector.id, detector.arch
        labels = [label_of_id[own_id[category.name]] for category in categories]
        self.labels = torch.tensor(labels, device=detector.category_ids.device)  # [categories]

    def __call__(
        self, images: Sequence[Tensor], boxes_px: Sequence[Tensor], categories: Sequence[Tensor], seed: int
    ) -> dict[str, Tensor]:
        """The four losses by name, scalars, means over the anchors or regions of all pictures.

        images: B of [3, H, W] in [0, 1], of any sizes; boxes_px: [n, 4] each, xyxy in pixels, n >= 1; categories: [n]
        each, indices into the dataset's. seed: of the anchors and regions that count.
        """
        targets = [
            {"boxes": boxes, "labels": self.labels[indices]}
            for boxes, indices in zip(boxes_px, categories, strict=True)
        ]
        device = images[0].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), _with_losses(self.model):
            torch.manual_seed(seed)
            losses: dict[str, Tensor] = self.model(list(images), targets)
        return losses


@contextmanager
def _with_losses(model: FasterRCNN) -> Iterator[None]:
    """The parts that compute losses believe that they train; no layer below them does."""
    parts = (model, model.rpn, model.roi_heads)
    for part in parts:
        part.training = True
    try:
        yield
    finally:
        for part in parts:
            part.training = False
