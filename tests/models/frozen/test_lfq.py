"""The tokenizer whose codes are signs: bits, the networks' own layers, averages, and what a bad file says."""

from __future__ import annotations

import pytest
import torch

from models.frozen.codec import codec_around, load_codec
from models.frozen.lfq import CodeNorm, LfqAutoencoder, Upsample

SIZES = {"widths": (32, 64), "depth": 1, "num_bits": 6}


@pytest.fixture
def network():
    return LfqAutoencoder(**SIZES).eval()


@pytest.fixture
def file(network, tmp_path):
    path = tmp_path / "lfq.ckpt"
    torch.save({"state_dict": network.state_dict() | {"loss.x": torch.zeros(1)}}, path)
    return path


def pixels() -> torch.Tensor:
    return torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_bit_0_is_the_lowest_and_codes_go_both_ways(network, file):
    codec = load_codec(file)
    assert (codec.stride, codec.codebook_size, codec.latent_channels) == (2, 64, 1)
    with torch.no_grad():
        signs = network.encoder(pixels()) > 0
        codes = codec.encode(pixels())
        assert codes.shape == (2, 1, 4, 6) and codes.dtype == torch.int16
        assert torch.equal(codes[:, 0].long(), sum(signs[:, bit].long() * 2**bit for bit in range(6)))
        expected = network.decoder(torch.where(signs, 1.0, -1.0)).clamp(-1, 1)
    torch.testing.assert_close(codec.decode(codec.mode(codes)), expected)


def test_a_bit_of_zero_is_off(network):
    network.encoder.conv_out.weight.data.zero_()
    network.encoder.conv_out.bias.data = torch.tensor([1.0, 0, -1, 0, 0, 1])
    assert network.codes_of(pixels()).unique().tolist() == [1 + 32]


def test_upsampling_puts_quarters_of_the_channels_into_cells():
    """Channel q * width + c goes to place (q // 2, q % 2) of the cell."""
    layer = Upsample(3)
    layer.conv1.weight.data.zero_()
    layer.conv1.bias.data = torch.arange(12.0)
    out = layer(torch.zeros(1, 3, 2, 1))
    assert out.shape == (1, 3, 4, 2)
    assert out[0, 1].tolist() == [[1, 4], [7, 10]] * 2


def test_norms_know_the_codes_spread_and_mean():
    layer = CodeNorm(2, 32)
    for linear, value in ((layer.gamma, 1.0), (layer.beta, 10.0)):
        linear.weight.data.fill_(value)
        linear.bias.data.zero_()
    bits = torch.tensor([[[[1.0, -1.0]], [[1.0, 1.0]]]])  # spreads sqrt(2) and 0, means 0 and 1
    x = torch.tensor([-1.0, 1.0]).expand(1, 32, 1, 2)
    spread = 2**0.5 + 1e-6**0.5
    torch.testing.assert_close(layer(x, bits)[0, 0, 0], 10 + spread * torch.tensor([-1.0, 1.0]), rtol=0, atol=1e-4)


def test_averages_are_taken_where_there_are_some(network, file, tmp_path):
    averages = {"model_ema." + name.replace(".", ""): 0.9 * value for name, value in network.state_dict().items()}
    torch.save(
        {"state_dict": network.state_dict() | averages | {"model_ema.decay": torch.tensor(0.999)}}, tmp_path / "both"
    )
    found = load_codec(tmp_path / "both").autoencoder.state_dict()
    assert all(torch.equal(found[name], 0.9 * value) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state | {"encoder.conv_out.weight": torch.zeros(18, 64, 1, 1)},
            "18 bits, at most 16.*two heads",
        ),
        (lambda state: state | {"decoder.extra": torch.zeros(1)}, r"left over decoder\.extra"),
        (lambda state: {k: v for k, v in state.items() if "norm_out" not in k}, r"missing encoder\.norm_out\.weight"),
        (lambda state: {k: v for k, v in state.items() if "down" not in k}, "not an autoencoder of Open-MAGVIT2"),
    ],
)
def test_bad_files(network, tmp_path, change, message):
    path = tmp_path / "bad.ckpt"
    torch.save({"state_dict": change(network.state_dict())}, path)
    with pytest.raises(ValueError, match=rf"LFQ checkpoint .*bad\.ckpt: .*{message}"):
        load_codec(path)


def test_no_scale_but_1(file):
    with pytest.raises(ValueError, match=r"asked for latent_scale 0\.5, but .*lfq\.ckpt makes codes"):
        load_codec(file, latent_scale=0.5)


def test_networks_survive_a_pipelines_folder(file, tmp_path):
    codec = load_codec(file)
    codec.autoencoder.save_pretrained(tmp_path / "vae")
    again = codec_around(LfqAutoencoder.from_pretrained(tmp_path / "vae", low_cpu_mem_usage=False), 1.0, codec.id)
    assert torch.equal(codec.encode(pixels()), again.encode(pixels()))


def test_the_published_sizes():
    with torch.device("meta"):
        network = LfqAutoencoder(widths=(128, 128, 256, 256, 512), depth=4, num_bits=14)
    assert (network.stride, network.codebook_size) == (16, 16384)
    assert sum(parameter.numel() for parameter in network.parameters()) == 115_094_033
