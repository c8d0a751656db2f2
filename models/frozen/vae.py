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

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from util.checkpoint import load_plain, sha256_file
from util.weights import tensor_problem

logger = logging.getLogger(__name__)

MAR_LATENT_SCALE = 0.2325
LDM_NORM_NUM_GROUPS = 32
LOGVAR_RANGE = (-30.0, 20.0)
IGNORED_PREFIXES = ("loss.",)  # the perceptual loss and the discriminator that LDM saves with its autoencoders
WHERE_TO_GET = "kl16.ckpt is linked from the README of https://github.com/LTH14/mar"


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
    norm_num_groups: int = LDM_NORM_NUM_GROUPS

    def __post_init__(self) -> None:
        if self.norm_num_groups < 1 or any(width % self.norm_num_groups for width in self.block_out_channels):
            raise ValueError(
                f"norm_num_groups={self.norm_num_groups} does not divide every width of {self.block_out_channels}"
            )

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
    (r"\.downsamplers\.0\.", ".downsample."),
    (r"\.upsamplers\.0\.", ".upsample."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
)


def ldm_name(name: str, num_levels: int) -> str:
    """The LDM name of a diffusers parameter, e.g. decoder.up_blocks.0.resnets.1.* -> decoder.up.<last>.block.1.*"""
    name = re.sub(r"\.up_blocks\.(\d+)\.", lambda found: f".up.{num_levels - 1 - int(found[1])}.", name)
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _is_attention_projection(ldm_key: str) -> bool:
    return re.search(r"\.attn(\.\d+|_1)\.(q|k|v|proj_out)\.weight$", ldm_key) is not None


def ldm_state_dict(autoencoder: AutoencoderKL) -> dict[str, Tensor]:
    """The autoencoder's parameters in LDM layout. The tensors share memory with the module."""
    num_levels = len(autoencoder.config.block_out_channels)
    renamed = {ldm_name(name, num_levels): tensor for name, tensor in autoencoder.state_dict().items()}
    return {key: value[:, :, None, None] if _is_attention_projection(key) else value for key, value in renamed.items()}


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
        expected = build_autoencoder(config)
    names = {ldm_name(name, len(config.block_out_channels)): name for name in expected.state_dict()}
    shapes = {key: tuple(tensor.shape) for key, tensor in ldm_state_dict(expected).items()}
    problems = [f"missing {key}" for key in names if key not in ldm_state]
    problems += [f"left over {key}" for key in ldm_state if key not in names]
    problems += [
        f"{key} has shape {tuple(ldm_state[key].shape)}, expected {shape}"
        for key, shape in shapes.items()
        if key in ldm_state and tuple(ldm_state[key].shape) != shape
    ]
    problems += [found for key in names if key in ldm_state and (found := tensor_problem(key, ldm_state[key]))]
    if problems:
        raise ValueError(f"{len(problems)} tensors do not fit {config}: {_shorten(problems)}")
    return {
        name: (ldm_state[key][:, :, 0, 0] if _is_attention_projection(key) else ldm_state[key]).float()
        for key, name in names.items()
    }


def _shorten(problems: Sequence[str], limit: int = 12) -> str:
    return "; ".join(problems[:limit]) + (f"; and {len(problems) - limit} more" if len(problems) > limit else "")


def infer_config(ldm_state: Mapping[str, Tensor], norm_num_groups: int = LDM_NORM_NUM_GROUPS) -> VaeConfig:
    """Reads the architecture off names and shapes. Raises ValueError if a tensor that defines it is missing."""
    num_levels = _count(ldm_state, r"encoder\.down\.(\d+)\.block\.0\.conv1\.weight")
    keys = [f"encoder.down.{level}.block.0.conv1.weight" for level in range(num_levels)]
    missing = [key for key in (*keys, "decoder.conv_in.weight") if key not in ldm_state]
    if missing or num_levels == 0:
        wanted = missing or ["encoder.down.0.block.0.conv1.weight"]
        raise ValueError(f"not an autoencoder in LDM layout: no tensor {', '.join(wanted)}")
    return VaeConfig(
        block_out_channels=tuple(ldm_state[key].shape[0] for key in keys),
        layers_per_block=_count(ldm_state, r"encoder\.down\.0\.block\.(\d+)\.conv1\.weight"),
        latent_channels=ldm_state["decoder.conv_in.weight"].shape[1],
        encoder_attention=f"encoder.down.{num_levels - 1}.attn.0.q.weight" in ldm_state,
        mid_attention="encoder.mid.attn_1.q.weight" in ldm_state,
        norm_num_groups=norm_num_groups,
    )


def _count(keys: Iterable[str], pattern: str) -> int:
    """One more than the largest index that `pattern`'s group matches; 0 if nothing matches."""
    matches = (re.fullmatch(pattern, key) for key in keys)
    return 1 + max((int(found[1]) for found in matches if found), default=-1)


def read_ldm_file(path: str | Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """-> (state dict in LDM layout without `IGNORED_PREFIXES`, the plain entries beside it).

    The state dict may be the file itself or lie under "model" or "state_dict", nested or not.
    Raises FileNotFoundError (naming the file and where to get it) and ValueError (not a checkpoint, no tensors).
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"VAE checkpoint not found: {path}. {WHERE_TO_GET}")
    payload: dict[str, object] = load_plain(path)
    entries: dict[str, object] = {}
    while nested := next((payload[key] for key in ("model", "state_dict") if isinstance(payload.get(key), dict)), None):
        entries |= {key: value for key, value in payload.items() if value is not nested}
        payload = nested  # type: ignore[assignment]
    tensors = {key: value for key, value in payload.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no state dict: expected tensors under 'model', found {sorted(payload)[:8]}")
    kept = {key: value for key, value in tensors.items() if not key.startswith(IGNORED_PREFIXES)}
    if len(kept) < len(tensors):
        logger.info("%s: ignored %d tensors named %s*", path, len(tensors) - len(kept), "*, ".join(IGNORED_PREFIXES))
    return kept, entries


class LatentCodec:
    """Images <-> scaled latents. Frozen, in eval mode, without gradients.

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
        state, entries = read_ldm_file(path)
        try:
            config = infer_config(state, _plain_int(entries, "norm_num_groups", LDM_NORM_NUM_GROUPS))
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
    def device(self) -> torch.device:
        return self.autoencoder.device

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """pixels: [B, 3, H, W] in [-1, 1] -> [B, 2C, h, w]: mean and clamped log-variance, unscaled."""
        stride = self.stride
        if pixels.dim() != 4 or pixels.shape[1] != 3 or pixels.shape[2] % stride or pixels.shape[3] % stride:
            raise ValueError(f"pixels must be [B, 3, H, W] with H, W multiples of {stride}, got {tuple(pixels.shape)}")
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
            if len(generators) != len(mean):
                raise ValueError(f"{len(mean)} images need as many generators, got {len(generators)}")
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


def _plain_int(entries: Mapping[str, object], key: str, default: int) -> int:
    value = entries.get(key, default)
    if not isinstance(value, int):
        raise ValueError(f"entry {key!r} must be an integer, got {value!r}")
    return value


def _resolve_scale(entries: Mapping[str, object], asked: float | None) -> float:
    stored = entries.get("latent_scale")
    if stored is None:
        return MAR_LATENT_SCALE if asked is None else asked
    if not isinstance(stored, float):
        raise ValueError(f"entry 'latent_scale' must be a number, got {stored!r}")
    if asked is not None and not math.isclose(asked, stored, rel_tol=1e-6):
        raise ValueError(f"asked for latent_scale {asked}, but the file was made for {stored}")
    return stored
