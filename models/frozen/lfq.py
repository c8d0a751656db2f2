"""A tokenizer without a codebook (lookup-free quantisation, MAGVIT-v2): a code's bits are the signs of its channels.

    code = sum_i [z_i > 0] 2^i, bit 0 lowest; decoded from z_i = +1 or -1

The networks of Open-MAGVIT2, under its parameters' names, sizes read off the tensors. Convolutions between two norms
have no bias. Each level of the decoder begins with a norm whose scale and shift are linear in the standard deviation
and in the mean of the code's channels over the image. Pixels are in [-1, 1]. A file's averages ("model_ema.", names
without dots) are taken where it has some, as the public sampling does.

Left out: 2^18 codes, which are predicted by two heads of 2^9; training.

Shape letters: B batch, H x W pixels, h x w codes, C channels, n bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from models.frozen.codes import CodeCodec
from models.frozen.published import NORM_NUM_GROUPS, count_indices, module_state, require_groups
from util.checkpoint import sha256_file

EPS = 1e-6
MOST_BITS = 16
AVERAGES = "model_ema."
_BUFFERS = ("quantize.",)  # the bits' weights, which older files store


class ResidualBlock(nn.Module):
    """x + F(x), F: twice norm, SiLU and 3x3 convolution."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.norm1 = _norm(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1, bias=False)
        self.norm2 = _norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        if width_in != width:
            self.nin_shortcut = nn.Conv2d(width_in, width, 1, bias=False)
        self.has_shortcut = width_in != width

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(functional.silu(self.norm1(x)))  # [B, C, H, W]
        hidden = self.conv2(functional.silu(self.norm2(hidden)))  # [B, C, H, W]
        return hidden + (self.nin_shortcut(x) if self.has_shortcut else x)  # [B, C, H, W]


class Level(nn.Module):
    """Residual blocks, then a change of size, if any, under its name."""

    def __init__(self, width_in: int, width: int, depth: int, **resizing: nn.Module) -> None:
        super().__init__()
        self.block = _blocks(width_in, width, depth)
        for name, module in resizing.items():
            self.add_module(name, module)
        self.parts = [self.block, *resizing.values()]

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)  # [B, C, H, W]
        return x


class Upsample(nn.Module):
    """Twice the side: four times the channels, of which each quarter is a place in a 2 x 2 cell."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, 4 * width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        cells = self.conv1(x).unflatten(1, (2, 2, x.shape[1]))  # [B, 2, 2, C, H, W]
        return cells.permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)  # [B, C, 2H, 2W]


class CodeNorm(nn.Module):
    """A group norm whose scale and shift come from the image's codes."""

    def __init__(self, num_bits: int, width: int) -> None:
        super().__init__()
        self.gamma = nn.Linear(num_bits, width)
        self.beta = nn.Linear(num_bits, width)

    def forward(self, x: Tensor, bits: Tensor) -> Tensor:
        each = bits.flatten(2)  # [B, n, h w]
        scale = self.gamma((each.var(dim=2) + EPS).sqrt())[:, :, None, None]  # [B, C, 1, 1]
        shift = self.beta(each.mean(dim=2))[:, :, None, None]  # [B, C, 1, 1]
        return scale * functional.group_norm(x, NORM_NUM_GROUPS, eps=EPS) + shift  # [B, C, H, W]


class Encoder(nn.Module):
    """[B, 3, H, W] -> [B, n, h, w]. widths: of the levels, from the image."""

    def __init__(self, widths: tuple[int, ...], depth: int, num_bits: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.down = nn.ModuleList()
        for index, (width_in, width) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            is_last = index + 1 == len(widths)
            smaller = {} if is_last else {"downsample": nn.Conv2d(width, width, 3, stride=2, padding=1)}
            self.down.append(Level(width_in, width, depth, **smaller))
        self.mid_block = _blocks(widths[-1], widths[-1], depth)
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], num_bits, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)  # [B, C, H, W]
        for level in self.down:
            x = level(x)  # [B, C, ., .]
        x = self.mid_block(x)  # [B, C, h, w]
        return self.conv_out(functional.silu(self.norm_out(x)))  # [B, n, h, w]


class Decoder(nn.Module):
    """[B, n, h, w] -> [B, 3, H, W]. widths: of the levels, from the image, as `up` and `adaptive` are numbered."""

    def __init__(self, widths: tuple[int, ...], depth: int, num_bits: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(num_bits, widths[-1], 3, padding=1)
        self.mid_block = _blocks(widths[-1], widths[-1], depth)
        self.up, self.adaptive = nn.ModuleList(), nn.ModuleList()
        for index, (width, width_in) in enumerate(zip(widths, (*widths[1:], widths[-1]), strict=True)):
            larger = {"upsample": Upsample(width)} if index > 0 else {}
            self.up.append(Level(width_in, width, depth, **larger))
            self.adaptive.append(CodeNorm(num_bits, width_in))
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, bits: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(bits))  # [B, C, h, w]
        for index in reversed(range(len(self.up))):
            x = self.up[index](self.adaptive[index](x, bits))  # [B, C, ., .]
        return self.conv_out(functional.silu(self.norm_out(x)))  # [B, 3, H, W]


class LfqAutoencoder(ModelMixin, ConfigMixin):
    """A `CodeNetwork` (`codes.py`). Its module's path is written into saved pipelines: it has to stay."""

    @register_to_config
    def __init__(self, widths: tuple[int, ...], depth: int, num_bits: int) -> None:
        """widths: of the levels, from the image. depth: residual blocks of a level and of the middles."""
        super().__init__()
        require_groups(NORM_NUM_GROUPS, widths)
        if not 1 <= num_bits <= MOST_BITS:
            raise ValueError(
                f"a code has {num_bits} bits, at most {MOST_BITS} are possible: the 2^18 codes of Open-MAGVIT2 are "
                "predicted by two heads, which is left out"
            )
        self.encoder = Encoder(tuple(widths), depth, num_bits)
        self.decoder = Decoder(tuple(widths), depth, num_bits)

    @property
    def stride(self) -> int:
        return 2 ** (len(self.config.widths) - 1)

    @property
    def codebook_size(self) -> int:
        return 1 << self.config.num_bits

    def codes_of(self, pixels: Tensor) -> Tensor:
        bits = self.encoder(pixels) > 0  # [B, n, h, w]
        return (bits.long() << self._places(bits)).sum(dim=1)  # [B, h, w]

    def pixels_of(self, codes: Tensor) -> Tensor:
        bits = (codes[:, None] >> self._places(codes)) & 1  # [B, n, h, w]
        return self.decoder(2.0 * bits - 1)  # [B, 3, H, W]

    def _places(self, like: Tensor) -> Tensor:
        return torch.arange(self.config.num_bits, device=like.device)[:, None, None]  # [n, 1, 1]


def is_lfq_state(state: Mapping[str, Tensor]) -> bool:
    """Whether tensors with these names are of Open-MAGVIT2's autoencoder."""
    return "decoder.adaptive.0.gamma.weight" in state


def lfq_from_state(state: Mapping[str, Tensor], path: str | Path, device: torch.device | str) -> CodeCodec:
    """A codec from what `read_tokenizer_file` has read from `path`; strictly.

    Raises ValueError naming the file if tensors are missing, left over, misshapen or not finite, or for too many bits.
    """
    raw = {key: tensor for key, tensor in state.items() if not key.startswith((AVERAGES, *_BUFFERS))}
    averages = {key: state[each] for key in raw if (each := AVERAGES + key.replace(".", "")) in state}
    try:
        sizes = _sizes_of(raw)
        with torch.device("meta"):
            autoencoder = LfqAutoencoder(**sizes)
        weights = module_state(raw | averages, autoencoder.state_dict(), None, sizes)
    except ValueError as error:
        raise ValueError(f"LFQ checkpoint {path}: {error}") from error
    autoencoder.load_state_dict(weights, strict=True, assign=True)
    return CodeCodec(autoencoder.to(device), sha256_file(path))


def _sizes_of(state: Mapping[str, Tensor]) -> dict[str, object]:
    """The arguments of `LfqAutoencoder`. Raises ValueError if a tensor that defines one is missing."""
    num_levels = count_indices(state, r"encoder\.down\.(\d+)\.block\.0\.conv1\.weight")
    keys = [f"encoder.down.{level}.block.0.conv1.weight" for level in range(max(1, num_levels))]
    if missing := [key for key in (*keys, "encoder.conv_out.weight") if key not in state]:
        raise ValueError(f"not an autoencoder of Open-MAGVIT2: no tensor {', '.join(missing)}")
    depth = count_indices(state, r"encoder\.down\.0\.block\.(\d+)\.conv1\.weight")
    widths = tuple(state[key].shape[0] for key in keys)
    return {"widths": widths, "depth": depth, "num_bits": state["encoder.conv_out.weight"].shape[0]}


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_NUM_GROUPS, width, eps=EPS)


def _blocks(width_in: int, width: int, depth: int) -> nn.Sequential:
    return nn.Sequential(*(ResidualBlock(width_in if index == 0 else width, width) for index in range(depth)))
