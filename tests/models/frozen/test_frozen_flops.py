"""What is counted of the frozen parts, against PyTorch's own counter while they really run."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.flops import META, PassFlops
from models.frozen.codec import load_codec
from models.frozen.faster_rcnn import DETECTORS, build_detector
from models.frozen.flops import decoder_flops, detector_flops
from models.frozen.vae import LatentCodec
from tests.conftest import ROOT


def test_a_decoder_costs_what_it_costs_to_run() -> None:
    codec = load_codec(ROOT / "pretrained_models/mini/vae/kl8_mini.ckpt")
    assert isinstance(codec, LatentCodec)
    latents = torch.zeros(1, codec.latent_channels, 4, 6, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        pixels = codec.autoencoder.decoder(codec.autoencoder.post_quant_conv(latents))
        forward = counter.get_total_flops()
        pixels.sum().backward()
    assert decoder_flops(codec, (4, 6)) == PassFlops(forward, counter.get_total_flops() - forward)
    assert codec.device.type == "cpu"  # a copy was counted


@pytest.mark.parametrize("arch", [arch for arch in DETECTORS if "resnet" not in arch])
def test_a_detector_costs_what_its_losses_cost(arch: str) -> None:
    """Fewer regions than there may be are cut out where few are proposed."""
    torch.manual_seed(0)
    model = build_detector(arch, num_classes=4).requires_grad_(False).train()
    side = model.transform.min_size[-1]
    pixels = torch.rand(3, side, side, requires_grad=True)
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    with FlopCounterMode(display=False) as counter:
        losses = model([pixels], [target])
        forward = counter.get_total_flops()
        torch.stack([*losses.values()]).sum().backward()
    counted = detector_flops(model)
    assert forward == pytest.approx(counted.forward, rel=0.05)
    assert counter.get_total_flops() - forward == pytest.approx(counted.backward, rel=0.05)
    assert model.training and next(model.parameters()).device.type == "cpu"


def test_the_detector_of_photographs_fits_a_picture_of_800_pixels() -> None:
    with META:
        model = build_detector("fasterrcnn_resnet50_fpn_v2", num_classes=91)
    flops = detector_flops(model)
    assert 0.4e12 < flops.forward < 0.5e12 and flops.backward == pytest.approx(flops.forward)
