"""The frozen tokenizer of discrete codes: parity with LlamaGen's, the key map, folders, and what a bad file says."""

import json

import pytest
import torch
from safetensors.torch import load_file

from engine.checkpoint.load import require_fitting_codec
from models.config import StructMARConfig
from models.frozen.codec import codec_around, load_codec
from models.frozen.codes import CodeCodec
from models.frozen.published import published_state
from models.frozen.vae import LatentCodec, VaeConfig, build_autoencoder, ldm_checkpoint
from models.frozen.vq import (
    VQ16,
    VqAutoencoder,
    VqConfig,
    build_vq,
    infer_vq_config,
    llamagen_name,
    nearest_codes,
)
from tests.conftest import ROOT
from tests.helpers.reference import relative_error
from tests.helpers.vq_file import TINY_VQ, write_vq
from tests.helpers.weights_rule import deterministic_tensor


def pixels(batch: int = 2, size: int = 16) -> torch.Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def tiny_file(tmp_path):
    return write_vq(tmp_path / "tiny.pt")


def test_vq16_parity(tmp_path, shared):
    """A full-size file in the published layout gives the original implementation's codes and pixels."""
    with torch.device("meta"):
        shapes = published_state(build_vq(VQ16).state_dict(), llamagen_name)
    state = {key: deterministic_tensor(key, tuple(tensor.shape)) for key, tensor in shapes.items()}
    path = tmp_path / "vq_ds16_c2i.pt"
    torch.save({"model": state | {"quantize.codebook_used": torch.zeros(65536)}}, path)
    codec = load_codec(path)
    assert (codec.stride, codec.latent_channels, codec.latent_scale, codec.codebook_size) == (16, 1, 1.0, 16384)
    assert sum(parameter.numel() for parameter in codec.autoencoder.parameters()) == 71_883_403
    reference = load_file(shared / "reference" / "maskgil" / "vq16.safetensors")
    codes = codec.encode(reference["image"])
    assert codes.dtype == torch.int16 and torch.equal(codes[:, 0].long(), reference["codes"].long())
    with torch.no_grad():
        decoded = codec.autoencoder.pixels_of(codes[:, 0].long())
    assert relative_error(decoded, reference["decoded"]) < 1e-5


def test_vq_tiny_parity(tmp_path, shared):
    folder = shared / "reference" / "maskgil"
    path = tmp_path / "tiny.pt"
    torch.save({"model": load_file(folder / "vq_tiny_weights.safetensors")}, path)
    codec, reference = load_codec(path), load_file(folder / "vq_tiny.safetensors")
    assert (codec.stride, codec.codebook_size) == (2, 64)
    codes = codec.encode(reference["image"])
    assert torch.equal(codes[:, 0].long(), reference["codes"].long())
    rows = codec.autoencoder.quantize.embedding(codes[:, 0].long()).permute(0, 3, 1, 2)
    torch.testing.assert_close(rows, reference["vectors"], rtol=0, atol=1e-6)
    expected = reference["decoded"].clamp(-1, 1)
    torch.testing.assert_close(codec.decode(codec.mode(codes)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "config"), [("llamagen_vq16", VQ16), ("llamagen_vq8", None)])
def test_names_are_the_manifests(shared, name, config):
    manifest = json.loads((shared / "reference" / "maskgil" / "manifest.json").read_text())[name]
    state = {key: torch.empty(shape, device="meta") for key, shape in manifest["tensors"].items()}
    found = infer_vq_config(state)
    assert found == (config or found)
    with torch.device("meta"):
        network = build_vq(found)
    ours = {key: list(tensor.shape) for key, tensor in published_state(network.state_dict(), llamagen_name).items()}
    assert ours | {"quantize.codebook_used": [65536]} == manifest["tensors"]
    assert {llamagen_name(own): own for own in network.state_dict()} == manifest["diffusers_names"]
    assert sum(parameter.numel() for parameter in network.parameters()) == manifest["params"]


@pytest.mark.parametrize("attention", ["encoder_attention", "decoder_attention", "mid_attention"])
def test_architecture_is_read_off_the_tensors(attention):
    config = VqConfig(**{**TINY_VQ.__dict__, attention: False})
    assert infer_vq_config(published_state(build_vq(config).state_dict(), llamagen_name), 4) == config


def test_a_file_and_what_it_gives(tiny_file):
    codec = load_codec(tiny_file)
    codes = codec.encode(pixels())
    assert codes.shape == (2, 1, 8, 8) and codes.dtype == torch.int16
    latents = codec.mode(codes)
    assert latents.dtype == torch.float32 and torch.equal(latents, codes.float())
    assert torch.equal(codec.sample(codes, [torch.Generator()] * 2), latents)
    assert codec.decode(latents).shape == (2, 3, 16, 16)
    assert not codec.autoencoder.training
    rows = codec.autoencoder.quantize.embedding.weight
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(32))


def test_the_length_of_a_row_in_the_file_does_not_matter(tiny_file, tmp_path):
    content = torch.load(tiny_file, weights_only=True)
    content["model"]["quantize.embedding.weight"] *= torch.linspace(0.5, 3, 32)[:, None]
    torch.save(content, tmp_path / "longer.pt")
    first, second = load_codec(tiny_file), load_codec(tmp_path / "longer.pt")
    assert torch.equal(first.encode(pixels()), second.encode(pixels())) and first.id != second.id


def test_nearest_codes_of_rows_of_any_length():
    draws = torch.Generator().manual_seed(3)
    features, codebook = torch.randn(50, 4, generator=draws), 2 * torch.randn(20, 4, generator=draws)
    assert torch.equal(nearest_codes(features, codebook), torch.cdist(features, codebook).argmin(dim=1))


@pytest.fixture
def folder(tmp_path):
    """A folder as diffusers writes it for aMUSEd."""
    from diffusers import VQModel

    network = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), latent_channels=4, num_vq_embeddings=32, norm_num_groups=4, vq_embed_dim=4,
        mid_block_add_attention=False, lookup_from_codebook=True,
    )  # fmt: skip
    network.quantize.embedding.weight.data.normal_(std=0.2)
    network.eval().save_pretrained(tmp_path / "vqvae")
    return tmp_path / "vqvae", network


def test_a_diffusers_folder_takes_pixels_from_0_to_1(folder):
    """Codes and pixels are those of the library's own calls on shares of 1."""
    path, network = folder
    codec = load_codec(path)
    with torch.no_grad():
        _, _, (_, _, flat) = network.quantize(network.encode(pixels() / 2 + 0.5).latents)
        decoded = network.decode(flat, force_not_quantize=True, shape=(2, 8, 8, 4)).sample
    codes = codec.encode(pixels())
    assert torch.equal(codes.flatten().long(), flat) and len(flat.unique()) > 1
    torch.testing.assert_close(codec.decode(codec.mode(codes)), decoded.clamp(0, 1) * 2 - 1, rtol=0, atol=1e-5)
    assert len(codec.id) == 64


def changed(path, **changes):
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))


def test_a_folder_may_say_its_pixels_range(folder):
    path, _ = folder
    before = load_codec(path)
    changed(path, unit_pixels=False)
    after = load_codec(path)
    assert before.id != after.id and not torch.equal(before.encode(pixels()), after.encode(pixels()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, r"config\.json: _class_name must be one of .*got 'AutoencoderKL'"),
        ({"norm_type": "spatial"}, "norm_type must be 'group', got 'spatial'"),
        ({"latent_channels": "4"}, "latent_channels must be a whole number of at least 1, got '4'"),
        ({"block_out_channels": 8}, "block_out_channels must be a list of int, got 8"),
        ({"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]}, "attention in the deepest level only"),
        ({"num_vq_embeddings": 64}, r"quantize\.embedding\.weight has shape \(32, 4\), expected \(64, 4\)"),
    ],
)
def test_bad_folders(folder, changes, message):
    changed(folder[0], **changes)
    with pytest.raises(ValueError, match=message):
        load_codec(folder[0])


def test_folders_without_files(folder):
    path, _ = folder
    (path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"vqvae has no diffusion_pytorch_model\.safetensors or"):
        load_codec(path)
    (path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_codec(path)


def test_load_codec_tells_kinds_apart(tiny_file, tmp_path):
    kl = VaeConfig((8, 16, 24), 1, 4, encoder_attention=False, mid_attention=True, norm_num_groups=4)
    torch.save(ldm_checkpoint(build_autoencoder(kl), 0.5, torch.float32), tmp_path / "kl.ckpt")
    found = load_codec(tmp_path / "kl.ckpt")
    assert isinstance(found, LatentCodec) and found.codebook_size == 0
    assert isinstance(load_codec(tiny_file, latent_scale=1.0), CodeCodec)
    with pytest.raises(ValueError, match=r"asked for latent_scale 0\.5, but .*tiny\.pt makes codes"):
        load_codec(tiny_file, latent_scale=0.5)
    with pytest.raises(FileNotFoundError, match=r"none\.pt.*github\.com/FoundationVision/LlamaGen"):
        load_codec(tmp_path / "none.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {k: v for k, v in state.items() if "mid.0.conv1.bias" not in k}, r"missing encoder\.mid\.0"),
        (lambda state: state | {"decoder.extra": torch.zeros(1)}, r"left over decoder\.extra"),
        (
            lambda state: state | {"quant_conv.bias": torch.zeros(5)},
            r"quant_conv\.bias has shape \(5,\), expected",
        ),
        (lambda state: state | {"quant_conv.bias": torch.full((4,), torch.nan)}, r"quant_conv\.bias is not finite"),
        (lambda state: {k: v for k, v in state.items() if not k.startswith("quantize")}, r"no tensor quantize\.embedd"),
    ],
)
def test_bad_state_dicts(tiny_file, change, message):
    content = torch.load(tiny_file, weights_only=True)
    torch.save(content | {"model": change(content["model"])}, tiny_file)
    with pytest.raises(ValueError, match=rf"VQ checkpoint .*tiny\.pt.*{message}"):
        load_codec(tiny_file)


def test_truncated_file(tiny_file):
    tiny_file.write_bytes(tiny_file.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"tiny\.pt"):
        load_codec(tiny_file)


def test_what_is_no_code_is_refused(tiny_file):
    codec = load_codec(tiny_file)
    for value in (-1.0, 32.0, 0.5, torch.nan):
        with pytest.raises(ValueError, match="whole numbers from 0 to 31"):
            codec.decode(torch.full((1, 1, 8, 8), value))
    with pytest.raises(ValueError, match=r"\[B, 1, h, w\], got \(1, 4, 8, 8\)"):
        codec.decode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="multiples of 2, got"):
        codec.encode(torch.zeros(1, 3, 15, 16))
    with pytest.raises(ValueError, match="2 images need as many generators, got 1"):
        codec.sample(torch.zeros(2, 1, 8, 8), [torch.Generator()])
    with pytest.raises(ValueError, match="codes take no noise"):
        codec.sample(torch.zeros(2, 1, 8, 8), noise=torch.zeros(2, 1, 8, 8))


def test_a_model_of_another_codebook_is_refused(tiny_file):
    codec = load_codec(tiny_file)
    fitting = {"img_size": 16, "vae_stride": 2, "vae_embed_dim": 1, "head": "discrete", "codebook_size": 32}
    require_fitting_codec(codec, tiny_file, StructMARConfig(**fitting))
    with pytest.raises(ValueError, match=r"the model has codebook_size 64, but the VAE .*tiny\.pt has 32"):
        require_fitting_codec(codec, tiny_file, StructMARConfig(**fitting | {"codebook_size": 64}))
    with pytest.raises(ValueError, match="the model has codebook_size 0, but the VAE .* has 32"):
        require_fitting_codec(codec, tiny_file, StructMARConfig(img_size=16, vae_stride=2))


def test_networks_survive_a_pipelines_folder(tiny_file, tmp_path):
    codec = load_codec(tiny_file)
    codec.autoencoder.save_pretrained(tmp_path / "vae")
    again = codec_around(VqAutoencoder.from_pretrained(tmp_path / "vae", low_cpu_mem_usage=False), 1.0, codec.id)
    assert torch.equal(codec.encode(pixels()), again.encode(pixels()))
    assert again.autoencoder.config.unit_pixels is False
    assert torch.equal(load_codec(tmp_path / "vae").encode(pixels()), codec.encode(pixels()))
    with pytest.raises(ValueError, match="asked for latent_scale 0.5"):
        codec_around(codec.autoencoder, 0.5, codec.id)


def test_the_committed_mini_tokenizer_loads():
    codec = load_codec(ROOT / "pretrained_models" / "mini" / "vq" / "vq4_mini.pt")
    assert (codec.stride, codec.codebook_size) == (4, 1024)
    codes = codec.encode(pixels(1, 64))
    assert codes.shape == (1, 1, 16, 16) and codec.decode(codec.mode(codes)).shape == (1, 3, 64, 64)
