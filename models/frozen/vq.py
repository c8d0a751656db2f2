"""The frozen image tokenizer of discrete codes: a VQ autoencoder, run by diffusers' `VQModel`.

    encode: pixels -> encoder -> 1x1 convolution -> the nearest row of the codebook -> its number
    decode: number -> row -> 1x1 convolution -> decoder -> pixels

Two kinds of files:

- LlamaGen's (`vq_ds16_c2i.pt`, `{"model": state_dict}`): names differ by a key map, the architecture is read off the
  tensors' shapes. Rows of the codebook are normalised on loading, as the public code does in every call; features need
  no normalising, since the nearest unit vector does not depend on a feature's length. The number of GroupNorm groups
  may stand beside "model" as "norm_num_groups"; 32 otherwise.
- Folders of diffusers (aMUSEd, Meissonic): config.json and weights. Rows are taken as they are, and the networks take
  pixels in [0, 1]; a config.json that says "unit_pixels": false means [-1, 1].

Left out: training (no gradients), attention at inner levels, spatial norms (MoVQ).

Shape letters: B batch, H x W pixels, h x w codes (H = h * stride), K codes, e channels of a code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import ModelMixin, VQModel  # noqa: F401 - diffusers looks for ModelMixin beside a component's class
from diffusers.configuration_utils import register_to_config
from torch import Tensor
from torch.nn import functional

from models.frozen.codes import CodeCodec
from models.frozen.published import (
    LAYER_RENAMES,
    NORM_NUM_GROUPS,
    count_indices,
    module_state,
    plain_int,
    published_state,
    renamed,
    require_groups,
)
from util.checkpoint import load_plain, sha256_file
from util.read import read_json

CODES_USED = "quantize.codebook_used"  # LlamaGen's record of the last codes in training
CODEBOOK = "quantize.embedding.weight"
FOLDER_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
FOLDER_CLASSES = ("VQModel", "VqAutoencoder")
_PLAIN_DOWN, _ATTENTION_DOWN = "DownEncoderBlock2D", "AttnDownEncoderBlock2D"
_PLAIN_UP, _ATTENTION_UP = "UpDecoderBlock2D", "AttnUpDecoderBlock2D"
_NOT_IN_CONFIG = ["in_channels", "out_channels", "act_fn", "sample_size", "scaling_factor", "norm_type",
                  "lookup_from_codebook", "force_upcast"]  # fmt: skip
_FEATURES_AT_ONCE = 4096  # compared with all codes: 256 MB for 16384 codes
Value = TypeVar("Value")


@dataclass(frozen=True)
class VqConfig:
    """What distinguishes one VQ autoencoder from another. Levels are counted from the image.

    encoder_attention, decoder_attention: attention after every residual block of the deepest level. mid_attention: in
    both middles. code_dim: channels of a code. unit_pixels: the networks take pixels in [0, 1] instead of [-1, 1].
    """

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    codebook_size: int
    code_dim: int
    encoder_attention: bool = True
    decoder_attention: bool = True
    mid_attention: bool = True
    norm_num_groups: int = NORM_NUM_GROUPS
    unit_pixels: bool = False

    def __post_init__(self) -> None:
        require_groups(self.norm_num_groups, self.block_out_channels)

    @property
    def block_types(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """diffusers' names of the encoder's and of the decoder's levels, each in its own order."""
        rest = len(self.block_out_channels) - 1
        down = (_PLAIN_DOWN,) * rest + (_ATTENTION_DOWN if self.encoder_attention else _PLAIN_DOWN,)
        return down, (_ATTENTION_UP if self.decoder_attention else _PLAIN_UP,) + (_PLAIN_UP,) * rest


VQ16 = VqConfig((128, 128, 256, 256, 512), 2, 256, 16384, 8)


class VqAutoencoder(VQModel):
    """diffusers' `VQModel` with the pixels' range in its config. A `CodeNetwork` (`codes.py`).

    Its module's path is written into saved pipelines: it has to stay.
    """

    ignore_for_config = _NOT_IN_CONFIG  # diffusers reads it from the class

    @register_to_config
    def __init__(
        self,
        block_out_channels: tuple[int, ...],
        layers_per_block: int,
        latent_channels: int,
        num_vq_embeddings: int,
        vq_embed_dim: int,
        down_block_types: tuple[str, ...],
        up_block_types: tuple[str, ...],
        mid_block_add_attention: bool,
        norm_num_groups: int,
        unit_pixels: bool,
    ) -> None:
        super().__init__(
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            latent_channels=latent_channels,
            num_vq_embeddings=num_vq_embeddings,
            vq_embed_dim=vq_embed_dim,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            mid_block_add_attention=mid_block_add_attention,
            norm_num_groups=norm_num_groups,
        )

    @property
    def stride(self) -> int:
        return 2 ** (len(self.config.block_out_channels) - 1)

    @property
    def codebook_size(self) -> int:
        size: int = self.config.num_vq_embeddings
        return size

    def features_of(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> what is compared with the codebook, [B, e, h, w]."""
        taken = pixels / 2 + 0.5 if self.config.unit_pixels else pixels  # [B, 3, H, W]
        return self.quant_conv(self.encoder(taken))  # [B, e, h, w]

    def codes_of(self, pixels: Tensor) -> Tensor:
        features = self.features_of(pixels)  # [B, e, h, w]
        rows = features.permute(0, 2, 3, 1)  # [B, h, w, e]
        return nearest_codes(rows.flatten(0, 2), self.quantize.embedding.weight).view(rows.shape[:3])  # [B, h, w]

    def pixels_of(self, codes: Tensor) -> Tensor:
        return self.pixels_of_rows(self.quantize.embedding(codes).permute(0, 3, 1, 2))  # [B, 3, H, W]

    def pixels_of_rows(self, rows: Tensor) -> Tensor:
        """Rows of the codebook [B, e, h, w] -> pixels [B, 3, H, W], as `pixels_of`."""
        pixels = self.decoder(self.post_quant_conv(rows.contiguous()))  # [B, 3, H, W]
        return pixels * 2 - 1 if self.config.unit_pixels else pixels  # [B, 3, H, W]


def nearest_codes(features: Tensor, codebook: Tensor) -> Tensor:
    """features [n, e], codebook [K, e] -> the number [n] of the row at the least distance, the first of equals."""
    half_norms = codebook.square().sum(dim=1) / 2  # [K]
    parts = [(part @ codebook.T - half_norms).argmax(dim=1) for part in features.split(_FEATURES_AT_ONCE)]  # [.] each
    return torch.cat(parts)  # [n]


def build_vq(config: VqConfig) -> VqAutoencoder:
    """A freshly initialised autoencoder, in train mode; the caller's torch.device context decides where."""
    down, up = config.block_types
    autoencoder = VqAutoencoder(
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        num_vq_embeddings=config.codebook_size,
        vq_embed_dim=config.code_dim,
        down_block_types=down,
        up_block_types=up,
        mid_block_add_attention=config.mid_attention,
        norm_num_groups=config.norm_num_groups,
        unit_pixels=config.unit_pixels,
    )
    return autoencoder.train()


_RENAMES = (
    (r"\.(?:down|up)_blocks\.(\d+)\.resnets\.", r".conv_blocks.\1.res."),
    (r"\.(?:down|up)_blocks\.(\d+)\.attentions\.", r".conv_blocks.\1.attn."),
    (r"\.(?:down|up)_blocks\.(\d+)\.", r".conv_blocks.\1."),
    (r"\.mid_block\.resnets\.0\.", ".mid.0."),
    (r"\.mid_block\.attentions\.0\.", ".mid.1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.2."),
    *LAYER_RENAMES,
)


def llamagen_name(name: str) -> str:
    """LlamaGen's name of a diffusers parameter. Both count the decoder's levels from the deepest."""
    return renamed(name, _RENAMES)


def llamagen_checkpoint(autoencoder: VqAutoencoder, dtype: torch.dtype) -> dict[str, object]:
    """What a file in LlamaGen's layout holds: weights in `dtype`, and the number of groups beside them."""
    state = published_state(autoencoder.state_dict(), llamagen_name)
    return {
        "model": {key: tensor.detach().to("cpu", dtype, copy=True) for key, tensor in state.items()},
        "norm_num_groups": autoencoder.config.norm_num_groups,
    }


def is_llamagen_state(state: Mapping[str, Tensor]) -> bool:
    """Whether tensors with these names are of a VQ autoencoder in LlamaGen's layout."""
    return CODEBOOK in state or any(key.startswith("encoder.conv_blocks.") for key in state)


def infer_vq_config(state: Mapping[str, Tensor], norm_num_groups: int = NORM_NUM_GROUPS) -> VqConfig:
    """Reads the architecture off LlamaGen's names and shapes. Raises ValueError if a tensor that defines it is
    missing."""
    num_levels = count_indices(state, r"encoder\.conv_blocks\.(\d+)\.res\.0\.conv1\.weight")
    widths = [f"encoder.conv_blocks.{level}.res.0.conv1.weight" for level in range(max(1, num_levels))]
    sizes = ("decoder.conv_in.weight", CODEBOOK)
    missing = [key for key in (*widths, *sizes) if key not in state or state[key].dim() < 2]
    if missing:
        raise ValueError(f"not a VQ autoencoder in LlamaGen's layout: no tensor {', '.join(missing)}")
    return VqConfig(
        block_out_channels=tuple(state[key].shape[0] for key in widths),
        layers_per_block=count_indices(state, r"encoder\.conv_blocks\.0\.res\.(\d+)\.conv1\.weight"),
        latent_channels=state["decoder.conv_in.weight"].shape[1],
        codebook_size=state[CODEBOOK].shape[0],
        code_dim=state[CODEBOOK].shape[1],
        encoder_attention=f"encoder.conv_blocks.{num_levels - 1}.attn.0.q.weight" in state,
        decoder_attention="decoder.conv_blocks.0.attn.0.q.weight" in state,
        mid_attention="encoder.mid.1.q.weight" in state,
        norm_num_groups=norm_num_groups,
    )


def folder_config(values: Mapping[str, Any]) -> VqConfig:
    """The architecture that a diffusers folder's config.json states. Raises ValueError naming what is unknown."""
    if values.get("_class_name") not in FOLDER_CLASSES:
        raise ValueError(f"_class_name must be one of {FOLDER_CLASSES}, got {values.get('_class_name')!r}")
    if values.get("norm_type", "group") != "group":
        raise ValueError(f"norm_type must be 'group', got {values['norm_type']!r}")
    down, up = _listed(values, "down_block_types", str), _listed(values, "up_block_types", str)
    latent_channels = _size(values, "latent_channels")
    code_dim = latent_channels if values.get("vq_embed_dim") is None else _size(values, "vq_embed_dim")
    config = VqConfig(
        block_out_channels=_listed(values, "block_out_channels", int),
        layers_per_block=_size(values, "layers_per_block"),
        latent_channels=latent_channels,
        codebook_size=_size(values, "num_vq_embeddings"),
        code_dim=code_dim,
        encoder_attention=down[-1] == _ATTENTION_DOWN,
        decoder_attention=up[0] == _ATTENTION_UP,
        mid_attention=_is_on(values, "mid_block_add_attention"),
        norm_num_groups=_size(values, "norm_num_groups", NORM_NUM_GROUPS),
        unit_pixels=_is_on(values, "unit_pixels"),
    )
    if config.block_types != (down, up):
        raise ValueError(f"blocks must be {config.block_types} (attention in the deepest level only), got {(down, up)}")
    return config


def _size(values: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = values.get(name, default)
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value


def _is_on(values: Mapping[str, Any], name: str) -> bool:
    """True where config.json does not say it."""
    value = values.get(name, True)
    if type(value) is not bool:
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value


def _listed(values: Mapping[str, Any], name: str, kind: type[Value]) -> tuple[Value, ...]:
    found = values.get(name)
    if not isinstance(found, list) or not found or any(type(each) is not kind for each in found):
        raise ValueError(f"{name} must be a list of {kind.__name__}, got {found!r}")
    return tuple(found)


def vq_from_state(
    state: Mapping[str, Tensor], entries: Mapping[str, object], path: str | Path, device: torch.device | str
) -> CodeCodec:
    """A codec from what `read_tokenizer_file` has read from `path`, in LlamaGen's layout; strictly.

    Raises ValueError naming the file if tensors are missing, left over, misshapen or not finite.
    """
    kept = {key: tensor for key, tensor in state.items() if key != CODES_USED}
    try:
        config = infer_vq_config(kept, plain_int(entries, "norm_num_groups", NORM_NUM_GROUPS))
        weights = _weights_for(config, kept, is_llamagen=True)
    except ValueError as error:
        raise ValueError(f"VQ checkpoint {path}: {error}") from error
    weights[CODEBOOK] = functional.normalize(weights[CODEBOOK], dim=1)  # [K, e]
    return CodeCodec(_assembled(config, weights, device), sha256_file(path))


def vq_from_folder(folder: str | Path, device: torch.device | str) -> CodeCodec:
    """A codec from a folder of diffusers: config.json and weights. Its id covers both files.

    Raises FileNotFoundError naming the file that is missing, ValueError naming the one that does not fit.
    """
    config_path = Path(folder) / "config.json"
    values = read_json(config_path, "VQ config")
    if not isinstance(values, dict):
        raise ValueError(f"{config_path} must hold a json object, got a {type(values).__name__}")
    weights_path = next((Path(folder) / name for name in FOLDER_WEIGHTS if (Path(folder) / name).is_file()), None)
    if weights_path is None:
        raise FileNotFoundError(f"{folder} has no {' or '.join(FOLDER_WEIGHTS)}")
    try:
        config = folder_config(values)
    except ValueError as error:
        raise ValueError(f"{config_path}: {error}") from error
    try:
        weights = _weights_for(config, load_plain(weights_path), is_llamagen=False)
    except ValueError as error:
        raise ValueError(f"VQ checkpoint {weights_path}: {error}") from error
    files = (config_path, weights_path)
    stated = "".join(f"{path.name} {sha256_file(path)}\n" for path in files)
    return CodeCodec(_assembled(config, weights, device), hashlib.sha256(stated.encode()).hexdigest())


def _weights_for(config: VqConfig, state: Mapping[str, Tensor], is_llamagen: bool) -> dict[str, Tensor]:
    with torch.device("meta"):
        expected = build_vq(config).state_dict()
    return module_state(state, expected, llamagen_name if is_llamagen else None, config)


def _assembled(config: VqConfig, weights: Mapping[str, Tensor], device: torch.device | str) -> VqAutoencoder:
    with torch.device("meta"):
        autoencoder = build_vq(config)
    autoencoder.load_state_dict(weights, strict=True, assign=True)
    return autoencoder.to(device)
