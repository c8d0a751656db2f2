"""The frozen VAE: parity with MAR's kl16, the LDM key map, the latent scale, and what a bad file says."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.frozen.vae import (
    KL16,
    LatentCodec,
    VaeConfig,
    build_autoencoder,
    diffusers_state_dict,
    infer_config,
    ldm_checkpoint,
    ldm_name,
    ldm_state_dict,
)
from tests.helpers.weights_rule import deterministic_tensor

MINI = VaeConfig((8, 16, 24), 1, 4, encoder_attention=False, mid_attention=True, norm_num_groups=4)
DATA = Path(__file__).parents[2] / "data"


def ruled_state(config: VaeConfig) -> dict[str, torch.Tensor]:
    """An LDM-layout state dict filled by the rule the reference numbers were made with."""
    with torch.device("meta"):
        shapes = {key: tuple(tensor.shape) for key, tensor in ldm_state_dict(build_autoencoder(config)).items()}
    return {key: deterministic_tensor(key, shape) for key, shape in shapes.items()}


@pytest.fixture(scope="module")
def mini_state() -> dict[str, torch.Tensor]:
    return ruled_state(MINI)


@pytest.fixture
def mini_file(tmp_path, mini_state) -> Path:
    path = tmp_path / "mini.ckpt"
    torch.save({"model": mini_state, "norm_num_groups": 4}, path)
    return path


def pixels(batch: int = 2, size: int = 16) -> torch.Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_kl16_parity(tmp_path):
    """A full-size file in kl16.ckpt's layout gives the original implementation's numbers."""
    path = tmp_path / "kl16.ckpt"
    torch.save({"model": ruled_state(KL16) | {"loss.logvar": torch.zeros(())}}, path)
    codec = LatentCodec.load(path)
    assert codec.config == KL16 and codec.stride == 16 and codec.latent_channels == 16
    assert codec.latent_scale == 0.2325
    assert sum(parameter.numel() for parameter in codec.autoencoder.parameters()) == 66_456_019
    reference = load_file(DATA / "kl16.safetensors")
    with torch.no_grad():
        decoded = codec._decode_raw(reference["latents"])
    torch.testing.assert_close(codec.encode(reference["image"]), reference["moments"], rtol=0, atol=1e-5)
    torch.testing.assert_close(decoded, reference["decoded"], rtol=0, atol=1e-5)
    clamped = codec.decode(reference["latents"] * 0.2325)
    torch.testing.assert_close(clamped, reference["decoded"].clamp(-1, 1), rtol=0, atol=1e-5)


def test_kl16_names_are_the_manifests(shared):
    manifest = json.loads((shared / "reference" / "manifest.json").read_text())["kl16"]["tensors"]
    with torch.device("meta"):
        state = ldm_state_dict(build_autoencoder(KL16))
    assert {key: list(tensor.shape) for key, tensor in state.items()} == manifest
    assert infer_config({key: torch.empty(shape, device="meta") for key, shape in manifest.items()}) == KL16


@pytest.mark.parametrize("encoder_attention", [False, True])
@pytest.mark.parametrize("mid_attention", [False, True])
def test_key_map_round_trips_both_ways(encoder_attention, mid_attention):
    config = VaeConfig((8, 8, 16), 2, 4, encoder_attention, mid_attention, norm_num_groups=8)
    autoencoder = build_autoencoder(config)
    ldm = {key: tensor.clone() for key, tensor in ldm_state_dict(autoencoder).items()}
    assert infer_config(ldm, 8) == config
    restored = diffusers_state_dict(ldm, config)
    assert restored.keys() == autoencoder.state_dict().keys()
    assert all(torch.equal(restored[name], tensor) for name, tensor in autoencoder.state_dict().items())
    other = build_autoencoder(config)
    other.load_state_dict(restored)
    again = ldm_state_dict(other)
    assert again.keys() == ldm.keys()
    assert all(torch.equal(again[key], tensor) and again[key].shape == tensor.shape for key, tensor in ldm.items())


def test_decoder_levels_are_counted_backwards():
    assert ldm_name("decoder.up_blocks.0.resnets.1.conv1.weight", 5) == "decoder.up.4.block.1.conv1.weight"
    assert ldm_name("encoder.down_blocks.0.resnets.1.conv1.weight", 5) == "encoder.down.0.block.1.conv1.weight"


def test_mini_architecture_is_inferred(mini_file):
    codec = LatentCodec.load(mini_file)
    assert codec.config == MINI and codec.stride == 4 and codec.latent_channels == 4
    assert codec.id == hashlib.sha256(mini_file.read_bytes()).hexdigest()
    assert codec.encode(pixels()).shape == (2, 8, 4, 4)
    assert codec.decode(torch.zeros(2, 4, 4, 4)).shape == (2, 3, 16, 16)
    assert not codec.autoencoder.training
    assert not any(parameter.requires_grad for parameter in codec.autoencoder.parameters())


def test_groups_change_the_result(tmp_path, mini_state, mini_file):
    """The number of groups is not in the tensors: the entry must be read, not guessed."""
    other = tmp_path / "other.ckpt"
    torch.save({"model": mini_state, "norm_num_groups": 8}, other)
    assert not torch.allclose(LatentCodec.load(mini_file).encode(pixels()), LatentCodec.load(other).encode(pixels()))


def test_nested_state_dict_and_half_precision(tmp_path, mini_state, mini_file):
    path = tmp_path / "nested.ckpt"
    half = {key: tensor.half() for key, tensor in mini_state.items()}
    torch.save({"epoch": 3, "norm_num_groups": 4, "state_dict": {"model": half}}, path)
    codec = LatentCodec.load(path)
    assert all(parameter.dtype == torch.float32 for parameter in codec.autoencoder.parameters())
    expected = LatentCodec.load(mini_file).encode(pixels())
    torch.testing.assert_close(codec.encode(pixels()), expected, rtol=0.05, atol=0.02)


def test_scale_is_applied_exactly_once(mini_file):
    codec = LatentCodec.load(mini_file, latent_scale=0.5)
    moments = codec.encode(pixels())
    mean, logvar = moments.chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(codec.mode(moments), 0.5 * mean)
    torch.testing.assert_close(codec.sample(moments, noise=noise), 0.5 * (mean + (0.5 * logvar).exp() * noise))
    torch.testing.assert_close(codec.decode(codec.mode(moments)), codec._decode_raw(mean).clamp(-1, 1))
    assert torch.equal(codec.encode(pixels()), LatentCodec.load(mini_file, latent_scale=2.0).encode(pixels()))


def test_an_images_latents_depend_on_its_own_generator(mini_file):
    codec = LatentCodec.load(mini_file)
    moments = codec.encode(pixels())
    both = codec.sample(moments, [torch.Generator().manual_seed(seed) for seed in (3, 4)])
    alone = codec.sample(moments[1:], [torch.Generator().manual_seed(4)])
    assert torch.equal(both[1:], alone)
    with pytest.raises(ValueError, match="2 images need as many generators, got 1"):
        codec.sample(moments, [torch.Generator()])
    with pytest.raises(ValueError, match="not both and not neither"):
        codec.sample(moments)


def test_log_variance_is_clamped(tmp_path, mini_state):
    path = tmp_path / "loud.ckpt"
    bias = mini_state["quant_conv.bias"].clone()
    bias[4:6], bias[6:] = 1e4, -1e4
    torch.save({"model": mini_state | {"quant_conv.bias": bias}, "norm_num_groups": 4}, path)
    logvar = LatentCodec.load(path).encode(pixels())[:, 4:]
    assert logvar.max() == 20 and logvar.min() == -30


def test_stored_scale(tmp_path):
    path = tmp_path / "scaled.ckpt"
    torch.save(ldm_checkpoint(build_autoencoder(MINI), 0.75, torch.float16), path)
    assert LatentCodec.load(path).latent_scale == 0.75
    assert LatentCodec.load(path, latent_scale=0.75).latent_scale == 0.75
    with pytest.raises(ValueError, match=r"scaled\.ckpt: asked for latent_scale 0\.2325, .* made for 0\.75"):
        LatentCodec.load(path, latent_scale=0.2325)


def test_missing_file_says_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"kl16\.ckpt.*github\.com/LTH14/mar"):
        LatentCodec.load(tmp_path / "kl16.ckpt")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_not_a_checkpoint(tmp_path, content):
    path = tmp_path / "broken.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.ckpt"):
        LatentCodec.load(path)


def test_truncated_file(mini_file):
    mini_file.write_bytes(mini_file.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"mini\.ckpt"):
        LatentCodec.load(mini_file)


def without(key: str):
    return lambda state: {name: tensor for name, tensor in state.items() if name != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("decoder.up.1.block.0.conv2.bias"), r"missing decoder\.up\.1\.block\.0\.conv2\.bias"),
        (without("decoder.conv_in.weight"), r"not an autoencoder in LDM layout: no tensor decoder\.conv_in\.weight"),
        (lambda state: state | {"decoder.extra": torch.zeros(1)}, r"left over decoder\.extra"),
        (
            lambda state: state | {"quant_conv.weight": torch.zeros(6, 8, 1, 1)},
            r"quant_conv\.weight has shape \(6, 8, 1, 1\), expected \(8, 8, 1, 1\)",
        ),
        (lambda state: {"weight": torch.zeros(1)}, "not an autoencoder in LDM layout"),
        (lambda state: {}, "holds no state dict"),
    ],
)
def test_bad_state_dicts(tmp_path, mini_state, change, message):
    path = tmp_path / "bad.ckpt"
    torch.save({"model": change(mini_state), "norm_num_groups": 4}, path)
    with pytest.raises(ValueError, match=rf"bad\.ckpt.*{message}"):
        LatentCodec.load(path)


def test_groups_that_do_not_divide(tmp_path, mini_state):
    path = tmp_path / "bad.ckpt"
    torch.save({"model": mini_state}, path)
    with pytest.raises(ValueError, match=r"bad\.ckpt.*norm_num_groups=32 does not divide"):
        LatentCodec.load(path)


def test_wrong_shapes_name_both_values(mini_file):
    codec = LatentCodec.load(mini_file)
    with pytest.raises(ValueError, match=r"\[B, 4, h, w\].*\(1, 16, 4, 4\)"):
        codec.decode(torch.zeros(1, 16, 4, 4))
    with pytest.raises(ValueError, match=r"\[B, 8, h, w\].*\(1, 32, 4, 4\)"):
        codec.mode(torch.zeros(1, 32, 4, 4))
    with pytest.raises(ValueError, match=r"multiples of 4, got \(1, 3, 18, 16\)"):
        codec.encode(torch.zeros(1, 3, 18, 16))
