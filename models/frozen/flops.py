"""FLOPs of what is frozen and still passes a gradient on: the image decoder, and a detector that computes its losses.

Counted on the meta device, on copies of the modules without their numbers. `backward` is the gradient of the input
alone: frozen weights have none.

Shape letters: C latent channels, h x w latent cells, S side of the detector's input in pixels, n regions of an image,
D channels and s x s cells of a region.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN

from models.flops import META, PassFlops
from models.frozen.vae import LatentCodec
from util.flops import FlopCounter


def decoder_flops(codec: LatentCodec, grid: tuple[int, int]) -> PassFlops:
    """Of decoding one image of (rows, columns) latent cells."""
    autoencoder = _without_numbers(codec.autoencoder)
    latents = torch.zeros(1, codec.latent_channels, *grid, device=META, requires_grad=True)  # [1, C, h, w]
    with FlopCounter() as counter:
        pixels = autoencoder.decoder(autoencoder.post_quant_conv(latents))  # [1, 3, H, W]
        forward = counter.flops
        pixels.sum().backward()
    return PassFlops(forward, counter.flops - forward)


def detector_flops(detector: FasterRCNN) -> PassFlops:
    """Of the losses of one square image with as many sampled regions as there may be. The gradient of the regions ends
    at the features that they are cut from."""
    model, side = _without_numbers(detector), detector.transform.min_size[-1]
    pixels = torch.zeros(1, 3, side, side, device=META, requires_grad=True)  # [1, 3, S, S]
    cells, num_regions = model.roi_heads.box_roi_pool.output_size, model.roi_heads.fg_bg_sampler.batch_size_per_image
    shape = (num_regions, model.backbone.out_channels, *cells)
    regions = torch.zeros(shape, device=META, requires_grad=True)  # [n, D, s, s]
    with FlopCounter() as counter:
        levels = model.backbone(pixels)
        scores, deltas = model.rpn.head([levels] if isinstance(levels, Tensor) else list(levels.values()))
        found = model.roi_heads.box_predictor(model.roi_heads.box_head(regions))
        forward = counter.flops
        torch.stack([output.sum() for output in (*scores, *deltas, *found)]).sum().backward()
    return PassFlops(forward, counter.flops - forward)


def _without_numbers(module: nn.Module) -> Any:
    """A copy on the meta device; the original stays as it is."""
    return copy.deepcopy(module).to(META).eval().requires_grad_(False)
