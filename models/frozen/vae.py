"""The frozen image tokenizer: a KL autoencoder in Latent Diffusion's (LDM's) checkpoint layout, run by diffusers.

`kl16.ckpt`, the VAE of MAR, holds `{"model": state_dict}` under LDM's names. Three things differ from
`diffusers.AutoencoderKL`: the names, the attention projections (1x1 convolutions there, linear layers here) and the
order of the decoder's levels (counted from the image there, from the latents here). The architecture is read off the
tensors' shapes. Two facts cannot be: the number of GroupNorm groups and the latent scale. A file may state them as the
plain entries "norm_num_groups" and "latent_scale" beside "model"; kl16.ckpt does not, so LDM's 32 and MAR's 0.2325 are
the defaults.

This is the only file that knows the latent scale: `sample` and `mode` multiply by it, `decode` divides by it, and
moments are always unscaled.

Left out: tiling, other latent normalisations (shift, per-channel), attention at inner levels, training (no gradients).

Shape letters: B batch, C latent channels, H x W pixels, h x w latents (H = h * stride).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from models.frozen.published import (
    LAYER_RENAMES,
    NORM_NUM_GROUPS,
    count_indices,
    module_state,
    plain_int,
    published_state,
    read_tokenizer_file,
    renamed,
    require_generators,
    require_groups,
    require_pixels,
)
from util.checkpoint import sha256_file

MAR_LATENT_SCALE = 0.2325
LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class VaeConfig:
    """What distinguishes one LDM autoencoder from another. Levels are counted from the image.

    encoder_attention: attention after every residual block of the encoder's last level. mid_attention: attention in
    the middles of encoder and decoder. The decoder's levels have none, and one residual block more than the encoder's.
    """

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    encoder_attention: bool
    mid_attention: bool
    norm_num_groups: int = NORM_NUM_GROUPS

    def __post_init__(self) -> None:
        require_groups(self.norm_num_groups, self.block_out_channels)

    @property
    def stride(self) -> int:
        """Pixels per latent: every level but the last halves the image."""
        return 2 ** (len(self.block_out_channels) - 1)


KL16 = VaeConfig((128, 128, 256, 256, 512), 2, 16, encoder_attention=True, mid_attention=True)


def build_autoencoder(config: VaeConfig) -> AutoencoderKL:
    """A freshly initialised autoencoder, in train mode; the caller's torch.device context decides where."""
    levels = len(config.block_out_channels)
    last_down = "AttnDownEncoderBlock2D" if config.encoder_attention else "DownEncoderBlock2D"
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * (levels - 1) + (last_down,),
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        mid_block_add_attention=config.mid_attention,
    )
    return autoencoder.train()


def config_of(autoencoder: AutoencoderKL) -> VaeConfig:
    """The inverse of `build_autoencoder`."""
    config = autoencoder.config
    return VaeConfig(
        block_out_channels=tuple(config.block_out_channels),
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        encoder_attention=config.down_block_types[-1].startswith("Attn"),
        mid_attention=config.mid_block_add_attention,
        norm_num_groups=config.norm_num_groups,
    )


_RENAMES = (
    (r"\.down_blocks\.(\d+)\.", r".down.\1."),
    (r"(\.down\.\d+|\.up\.\d+)\.resnets\.", r"\1.block."),
    (r"(\.down\.\d+)\.attentions\.", r"\1.attn."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    *LAYER_RENAMES,
)


def ldm_name(name: str, num_levels: int) -> str:
    """The LDM name of a diffusers parameter, e.g. decoder.up_blocks.0.resnets.1.* -> decoder.up.<last>.block.1.*"""
    name = re.sub(r"\.up_blocks\.(\d+)\.", lambda found: f".up.{num_levels - 1 - int(found[1])}.", name)
    return renamed(name, _RENAMES)


def ldm_state_dict(autoencoder: AutoencoderKL) -> dict[str, Tensor]:
    """The autoencoder's parameters in LDM layout. The tensors share memory with the module."""
    num_levels = len(autoencoder.config.block_out_channels)
    return published_state(autoencoder.state_dict(), partial(ldm_name, num_levels=num_levels))


def ldm_checkpoint(autoencoder: AutoencoderKL, latent_scale: float, dtype: torch.dtype) -> dict[str, object]:
    """What a file that `LatentCodec.load` needs no arguments for holds: weights in `dtype`, groups and scale."""
    state = ldm_state_dict(autoencoder)
    return {
        "model": {key: tensor.detach().to("cpu", dtype, copy=True) for key, tensor in state.items()},
        "norm_num_groups": autoencoder.config.norm_num_groups,
        "latent_scale": latent_scale,
    }


def diffusers_state_dict(ldm_state: Mapping[str, Tensor], config: VaeConfig) -> dict[str, Tensor]:
    """LDM layout -> diffusers' names and shapes, in float32. The inverse of `ldm_state_dict`.

    Raises ValueError listing missing tensors, tensors left over and tensors of another shape than `config` implies.
    """
    with torch.device("meta"):
        expected = build_autoencoder(config).state_dict()
    return module_state(ldm_state, expected, partial(ldm_name, num_levels=len(config.block_out_channels)), config)


def infer_config(ldm_state: Mapping[str, Tensor], norm_num_groups: int = NORM_NUM_GROUPS) -> VaeConfig:
    """Reads the architecture off names and shapes. Raises ValueError if a tensor that defines it is missing."""
    num_levels = count_indices(ldm_state, r"encoder\.down\.(\d+)\.block\.0\.conv1\.weight")
    keys = [f"encoder.down.{level}.block.0.conv1.weight" for level in range(num_levels)]
    missing = [key for key in (*keys, "decoder.conv_in.weight") if key not in ldm_state]
    if missing or num_levels == 0:
        wanted = missing or ["encoder.down.0.block.0.conv1.weight"]
        raise ValueError(f"not an autoencoder in LDM layout: no tensor {', '.join(wanted)}")
    return VaeConfig(
        block_out_channels=tuple(ldm_state[key].shape[0] for key in keys),
        layers_per_block=count_indices(ldm_state, r"encoder\.down\.0\.block\.(\d+)\.conv1\.weight"),
        latent_channels=ldm_state["decoder.conv_in.weight"].shape[1],
        encoder_attention=f"encoder.down.{num_levels - 1}.attn.0.q.weight" in ldm_state,
        mid_attention="encoder.mid.attn_1.q.weight" in ldm_state,
        norm_num_groups=norm_num_groups,
    )


class LatentCodec:
    """Images <-> scaled latents. Frozen, in eval mode, without gradients (`decode_with_gradient` has some).

    Attributes: id (sha256 of the file), latent_scale, latent_channels, stride (pixels per latent), config, device.
    """

    def __init__(self, autoencoder: AutoencoderKL, config: VaeConfig, latent_scale: float, file_id: str) -> None:
        if not (math.isfinite(latent_scale) and latent_scale > 0):
            raise ValueError(f"latent_scale must be positive and finite, got {latent_scale}")
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.config = config
        self.latent_scale = latent_scale
        self.id = file_id

    @classmethod
    def load(
        cls, path: str | Path, device: torch.device | str = "cpu", latent_scale: float | None = None
    ) -> LatentCodec:
        """Loads an LDM-layout checkpoint, strictly.

        latent_scale: None takes the file's own entry, or MAR's 0.2325 if it has none.
        Raises FileNotFoundError if there is no such file; ValueError naming the file if it is truncated, has missing
        or left-over tensors, or states another latent scale than the one asked for.
        """
        return cls.from_state(*read_tokenizer_file(path), path, device, latent_scale)

    @classmethod
    def from_state(
        cls,
        state: Mapping[str, Tensor],
        entries: Mapping[str, object],
        path: str | Path,
        device: torch.device | str = "cpu",
        latent_scale: float | None = None,
    ) -> LatentCodec:
        """As `load`, of what `read_tokenizer_file` has read from `path`."""
        try:
            config = infer_config(state, plain_int(entries, "norm_num_groups", NORM_NUM_GROUPS))
            weights = diffusers_state_dict(state, config)
            scale = _resolve_scale(entries, latent_scale)
        except ValueError as error:
            raise ValueError(f"VAE checkpoint {path}: {error}") from error
        with torch.device("meta"):
            autoencoder = build_autoencoder(config)
        autoencoder.load_state_dict(weights, strict=True, assign=True)
        return cls(autoencoder.to(device), config, scale, sha256_file(path))

    @property
    def stride(self) -> int:
        return self.config.stride

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    @property
    def codebook_size(self) -> int:
        return 0

    @property
    def device(self) -> torch.device:
        return self.autoencoder.device

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """pixels: [B, 3, H, W] in [-1, 1] -> [B, 2C, h, w]: mean and clamped log-variance, unscaled."""
        require_pixels(pixels, self.stride)
        hidden = self.autoencoder.encoder(pixels)  # [B, 2C, h, w]
        mean, logvar = self.autoencoder.quant_conv(hidden).chunk(2, dim=1)  # [B, C, h, w] each
        return torch.cat([mean, logvar.clamp(*LOGVAR_RANGE)], dim=1)  # [B, 2C, h, w]

    def mode(self, moments: Tensor) -> Tensor:
        """moments: [B, 2C, h, w] -> the scaled mean [B, C, h, w]."""
        mean, _ = self._split(moments)  # [B, C, h, w]
        return mean * self.latent_scale  # [B, C, h, w]

    def sample(
        self, moments: Tensor, generators: Sequence[torch.Generator] | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """moments: [B, 2C, h, w] -> scaled latents [B, C, h, w], mean + std * noise.

        Give either one generator per image (its draw does not depend on the others) or the noise [B, C, h, w] itself.
        """
        mean, logvar = self._split(moments)  # [B, C, h, w] each
        if (generators is None) == (noise is None):
            raise ValueError("sample needs either one generator per image or the noise, not both and not neither")
        if generators is not None:
            require_generators(len(generators), len(mean))
            noises = [torch.randn(mean.shape[1:], generator=each, device=each.device) for each in generators]
            noise = torch.stack(noises).to(mean)  # [B, C, h, w]
        assert noise is not None
        if noise.shape != mean.shape:
            raise ValueError(f"noise must have the latents' shape {tuple(mean.shape)}, got {tuple(noise.shape)}")
        return (mean + torch.exp(0.5 * logvar) * noise) * self.latent_scale  # [B, C, h, w]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """latents: [B, C, h, w], scaled -> pixels [B, 3, H, W], clamped to [-1, 1]."""
        return self._decode_raw(latents / self.latent_scale).clamp(-1, 1)  # [B, 3, H, W]

    def decode_with_gradient(self, latents: Tensor) -> Tensor:
        """latents: [B, C, h, w], scaled -> pixels [B, 3, H, W], not clamped, with gradients to the latents."""
        return self._decode_raw(latents / self.latent_scale)  # [B, 3, H, W]

    def _decode_raw(self, latents: Tensor) -> Tensor:
        """latents: [B, C, h, w], unscaled -> pixels [B, 3, H, W], not clamped."""
        if latents.dim() != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(f"latents must be [B, {self.latent_channels}, h, w] here, got {tuple(latents.shape)}")
        return self.autoencoder.decoder(self.autoencoder.post_quant_conv(latents))  # [B, 3, H, W]

    def _split(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        if moments.dim() != 4 or moments.shape[1] != 2 * self.latent_channels:
            raise ValueError(
                f"moments must be [B, {2 * self.latent_channels}, h, w] for a VAE with {self.latent_channels} latent "
                f"channels, got {tuple(moments.shape)}"
            )
        mean, logvar = moments.float().chunk(2, dim=1)  # [B, C, h, w] each
        return mean, logvar


def _resolve_scale(entries: Mapping[str, object], asked: float | None) -> float:
    stored = entries.get("latent_scale")
    if stored is None:
        return MAR_LATENT_SCALE if asked is None else asked
    if not isinstance(stored, float):
        raise ValueError(f"entry 'latent_scale' must be a number, got {stored!r}")
    if asked is not None and not math.isclose(asked, stored, rel_tol=1e-6):
        raise ValueError(f"asked for latent_scale {asked}, but the file was made for {stored}")
    return stored
