"""A differentiable reward: how far a picture is from its layout, as a loss with gradients to the pixels.

    loss = sum_d weight_d (the four training losses of detector d, with the wanted boxes) + w_colour colour
           + w_pixels pixels

Several detectors are an ensemble: what one of them alone can be fooled by counts less. Each sees its own augmentation
of the pictures (engine/rl/augment.py). The losses ask for every wanted object at its place, and for background
elsewhere.

`colour` is the squared distance between the mean colour of the middle of each box and that of the same place in the
real picture, red, green and blue in [0, 1], meaned over boxes. It is the real picture's colour that counts, since
captions do not name one for every box, and with several objects do not say which. What follows from that: where the
caption decides the colour, the loss asks for it; where it does not, its minimum is the mean over what may be, so keep
w_colour small where that is frequent. Objects in front of others are in both pictures.

`pixels` is the mean absolute difference of all pixels from the real picture's. It says nothing of layouts: it holds
what detectors do not look at, backgrounds and textures, at the price of blur.

Images without a valid box, because their layout was dropped, are left out: nothing is known of what they should hold.

Shape letters: B images, N boxes (max), n boxes of one image, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.rl.augment import Augmentation
from models.frozen.detector_loss import LOSSES, DetectorLoss
from util.rng import derive_seed, generator
from util.types import LayoutBatch

COLOUR_SHARE = 0.6  # of a box's sides: the middle, whose colour counts


@dataclass(frozen=True)
class PictureLoss:
    """See the module's docstring. detectors: with their weights, at least one. seed: the run's.

    Raises ValueError for no detector, weights that are not positive, and negative w_colour or w_pixels.
    """

    detectors: Sequence[tuple[DetectorLoss, float]]
    w_colour: float
    w_pixels: float
    augmentation: Augmentation
    seed: int

    def __post_init__(self) -> None:
        weights = [weight for _, weight in self.detectors]
        if not weights or min(weights) <= 0:
            raise ValueError(f"a differentiable reward needs detectors of positive weights, got {weights}")
        for name in ("w_colour", "w_pixels"):
            if vars(self)[name] < 0:
                raise ValueError(f"{name} must not be negative, got {vars(self)[name]}")

    @property
    def needs_real(self) -> bool:
        """Whether anything is compared with the real pictures."""
        return self.w_colour > 0 or self.w_pixels > 0

    @property
    def detector_id(self) -> str:
        """Which detectors reward, and how much of each."""
        if len(self.detectors) == 1:
            return self.detectors[0][0].id
        return " + ".join(f"{weight:g} {detector.id}" for detector, weight in self.detectors)

    def __call__(
        self, images: Tensor, layout: LayoutBatch, real: Tensor | None, key: Sequence[int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a scalar, and its parts by name, not weighted; 0 for a batch without boxes.

        images: [B, 3, H, W] in [0, 1], with gradients; real: the real ones, where `needs_real`. key: what makes the
        draws this pass's own.
        """
        total = 0.0 * images.sum()
        parts: dict[str, Tensor] = {}
        for place, (detector, weight) in enumerate(self.detectors):
            losses = self._detector_losses(detector, images, layout, (place, *key))
            total = total + weight * torch.stack(list(losses.values())).sum()
            prefix = "detector" if len(self.detectors) == 1 else f"detector{place}"
            parts |= {f"{prefix}/{name.removeprefix('loss_')}": loss.detach() for name, loss in losses.items()}
        distances = {"colour": (self.w_colour, colour_distance), "pixels": (self.w_pixels, pixel_distance)}
        for name, (weight, distance_of) in distances.items():
            if weight > 0:
                assert real is not None, "distances are to the real pictures"
                distance = distance_of(images, real, layout)
                total = total + weight * distance
                parts[name] = distance.detach()
        return total, parts

    def _detector_losses(
        self, detector: DetectorLoss, images: Tensor, layout: LayoutBatch, key: Sequence[int]
    ) -> dict[str, Tensor]:
        """Of the images that have boxes; zeros where none has."""
        rows = layout.valid.any(1).nonzero()[:, 0].tolist()
        if not rows:
            return dict.fromkeys(LOSSES, images.new_zeros(()))
        size = images.new_tensor([images.shape[3], images.shape[2]]).repeat(2)  # [4]
        boxes_px = [layout.boxes_xyxy[row][layout.valid[row]].to(images.dtype) * size for row in rows]
        categories = [layout.categories[row][layout.valid[row]] for row in rows]
        draws = generator(self.seed, "augmentation", *key)
        changed, moved = self.augmentation(images[rows], boxes_px, draws)
        return detector(changed, moved, categories, derive_seed(self.seed, "detector", *key))


def colour_distance(images: Tensor, real: Tensor, layout: LayoutBatch) -> Tensor:
    """A scalar, the mean over all valid boxes; 0 where there is none. images, real: [B, 3, H, W] in [0, 1]."""
    boxes = _middles(layout.boxes_xyxy.to(images.dtype))  # [B, N, 4]
    gaps = mean_colours(images, boxes) - mean_colours(real, boxes)  # [B, N, 3]
    distances = gaps.square().sum(-1) * layout.valid  # [B, N]
    return distances.sum() / layout.valid.sum().clamp(min=1)


def pixel_distance(images: Tensor, real: Tensor, layout: LayoutBatch) -> Tensor:
    """A scalar, the mean over pixels and channels of images with a valid box; 0 where none has one."""
    has_boxes = layout.valid.any(1)  # [B]
    distances = (images - real).abs().mean((1, 2, 3)) * has_boxes  # [B]
    return distances.sum() / has_boxes.sum().clamp(min=1)


def mean_colours(images: Tensor, boxes_xyxy: Tensor) -> Tensor:
    """The mean over each box, edge pixels by the share of them inside. images: [B, 3, H, W]; boxes_xyxy: [B, N, 4] in
    [0, 1]; gives [B, N, 3], 0 for a box without area."""
    height, width = images.shape[2:]
    across = _coverage(boxes_xyxy[..., 0], boxes_xyxy[..., 2], width)  # [B, N, W]
    down = _coverage(boxes_xyxy[..., 1], boxes_xyxy[..., 3], height)  # [B, N, H]
    area = across.sum(-1) * down.sum(-1)  # [B, N]
    sums = torch.einsum("bnh,bchw,bnw->bnc", down, images, across)  # [B, N, 3]
    return sums / area.clamp(min=1e-9)[..., None]  # [B, N, 3]


def _coverage(low: Tensor, high: Tensor, count: int) -> Tensor:
    """The share of each of `count` pixels in a row that lies between low and high, [B, N] in [0, 1]: [B, N, count]."""
    starts = torch.arange(count, dtype=low.dtype, device=low.device)  # [count]
    inside = torch.minimum(high[..., None] * count, starts + 1) - torch.maximum(low[..., None] * count, starts)
    return inside.clamp(min=0)  # [B, N, count]


def _middles(boxes_xyxy: Tensor) -> Tensor:
    """Boxes of `COLOUR_SHARE` of the sides, about the same centres."""
    centres = (boxes_xyxy[..., :2] + boxes_xyxy[..., 2:]) / 2
    halves = (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]) * (COLOUR_SHARE / 2)
    return torch.cat([centres - halves, centres + halves], dim=-1)


def straight_through_clamp(pixels: Tensor) -> Tensor:
    """Pixels [..., H, W] in [-1, 1] as they are shown, with a gradient of 1 everywhere: a plain clamp would teach
    nothing where a decoder overshoots."""
    return pixels + (pixels.clamp(-1, 1) - pixels).detach()
