"""Changes of a picture before a detector sees it, with gradients: what fools the detector at one place, size or
sharpness alone does not pay.

Each picture has its own changes, in this order: resized by a factor; set into a larger frame at a drawn place (its edge
pixels fill the rest, so no box is cut off); blurred; given noise. Boxes follow. The detector brings every picture to
its own input size again.

Shape letters: B pictures, n boxes of one, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

BLUR_RADII = 3  # of a Gaussian, in standard deviations


@dataclass(frozen=True)
class Augmentation:
    """The largest changes; each picture's are drawn between none and these, uniformly. 0: none.

    shift: width of the added frame, as a share of the picture's sides. blur: standard deviation in pixels. noise:
    standard deviation, of pixels in [0, 1]. resize: the factor is between 1 - resize and 1 + resize.
    Raises ValueError for a negative number and a resize of 1 or more.
    """

    shift: float = 0.0
    blur: float = 0.0
    noise: float = 0.0
    resize: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = vars(self)[field.name]
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{field.name} of an augmentation must be finite and not negative, got {value}")
        if self.resize >= 1:
            raise ValueError(f"resize of an augmentation must be below 1, got {self.resize}")

    def __call__(
        self, images: Tensor, boxes_px: Sequence[Tensor], draws: torch.Generator
    ) -> tuple[list[Tensor], list[Tensor]]:
        """images: [B, 3, H, W] in [0, 1]; boxes_px: B of [n, 4] xyxy. The same of the changed pictures. draws: on the
        CPU."""
        pairs = [self._change(image, boxes, draws) for image, boxes in zip(images, boxes_px, strict=True)]
        return [image for image, _ in pairs], [boxes for _, boxes in pairs]

    def _change(self, image: Tensor, boxes_px: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
        if self.resize > 0:
            image, boxes_px = _resized(image, boxes_px, 1 + self.resize * (2 * _uniform(draws) - 1))
        if self.shift > 0:
            image, boxes_px = _framed(image, boxes_px, self.shift, _uniform(draws), _uniform(draws))
        if self.blur > 0:
            image = _blurred(image, self.blur * _uniform(draws))
        if self.noise > 0:
            noise = torch.randn(image.shape, generator=draws, dtype=image.dtype).to(image.device)  # [3, H, W]
            image = image + self.noise * _uniform(draws) * noise  # [3, H, W]
        return image, boxes_px


def _uniform(draws: torch.Generator) -> float:
    return float(torch.rand((), generator=draws, dtype=torch.float64))


def _resized(image: Tensor, boxes_px: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """To the nearest whole pixels."""
    height, width = image.shape[1:]
    size = max(1, round(height * factor)), max(1, round(width * factor))
    changed = F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]  # [3, H', W']
    across, down = size[1] / width, size[0] / height
    return changed, boxes_px * boxes_px.new_tensor([across, down, across, down])


def _framed(image: Tensor, boxes_px: Tensor, share: float, place_x: float, place_y: float) -> tuple[Tensor, Tensor]:
    """place_x, place_y: in [0, 1), how much of the frame is left of the picture and above it."""
    height, width = image.shape[1:]
    frame_x, frame_y = round(share * width), round(share * height)
    left, top = math.floor(place_x * (frame_x + 1)), math.floor(place_y * (frame_y + 1))
    padding = (left, frame_x - left, top, frame_y - top)
    changed = F.pad(image[None], padding, mode="replicate")[0]  # [3, H', W']
    return changed, boxes_px + boxes_px.new_tensor([left, top, left, top])


def _blurred(image: Tensor, std: float) -> Tensor:
    radius = math.ceil(BLUR_RADII * std)
    if radius == 0:
        return image
    places = torch.arange(-radius, radius + 1, dtype=image.dtype, device=image.device)  # [2 r + 1]
    kernel = torch.softmax(-0.5 * (places / std).square(), dim=0)  # [2 r + 1]
    padded = F.pad(image[:, None], (radius, radius, radius, radius), mode="replicate")  # [3, 1, H + 2 r, W + 2 r]
    across = F.conv2d(padded, kernel[None, None, None])  # [3, 1, H + 2 r, W]
    return F.conv2d(across, kernel[None, None, :, None])[:, 0]  # [3, H, W]
