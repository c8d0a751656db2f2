"""The image tokenizer of discrete codes as an `ImageCodec`, whatever network makes the codes (`vq.py`, `lfq.py`).

Codes travel as latents of one channel and scale 1: whole numbers, in float32 where a model takes them.

Shape letters: B batch, H x W pixels, h x w codes (H = h * stride), K codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from models.frozen.published import require_generators, require_pixels

_MOST_INT16_CODES = 1 << 15


def code_dtype(codebook_size: int) -> torch.dtype:
    """What codes are kept in: int16 where all of them fit into it, else int32."""
    return torch.int16 if codebook_size <= _MOST_INT16_CODES else torch.int32


class CodeNetwork(Protocol):
    """The networks of a tokenizer of codes, whatever they are."""

    @property
    def stride(self) -> int: ...

    @property
    def codebook_size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def codes_of(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> codes [B, h, w], int64."""

    def pixels_of(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w], int64 -> pixels [B, 3, H, W] about [-1, 1], not clamped."""


class CodeCodec:
    """Images <-> codes, an `ImageCodec`. Frozen, in eval mode, without gradients.

    Attributes: id (sha256 of the file), autoencoder, codebook_size, stride (pixels per code), device.
    """

    latent_channels = 1
    latent_scale = 1.0

    def __init__(self, autoencoder: Any, file_id: str) -> None:
        """autoencoder: a module that is a `CodeNetwork`."""
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.id = file_id

    @property
    def _network(self) -> CodeNetwork:
        network: CodeNetwork = self.autoencoder
        return network

    @property
    def stride(self) -> int:
        return self._network.stride

    @property
    def codebook_size(self) -> int:
        return self._network.codebook_size

    @property
    def device(self) -> torch.device:
        return self._network.device

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """pixels: [B, 3, H, W] in [-1, 1] -> codes [B, 1, h, w] of `code_dtype`."""
        require_pixels(pixels, self.stride)
        return self._network.codes_of(pixels).to(code_dtype(self.codebook_size))[:, None]  # [B, 1, h, w]

    def mode(self, codes: Tensor) -> Tensor:
        """codes: [B, 1, h, w] of any type -> the same in float32."""
        if codes.dim() != 4 or codes.shape[1] != 1:
            raise ValueError(f"codes must be [B, 1, h, w], got {tuple(codes.shape)}")
        return codes.float()  # [B, 1, h, w]

    def sample(
        self, codes: Tensor, generators: Sequence[torch.Generator] | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """As `mode`: an image has one code in each cell, nothing is drawn. Raises ValueError for noise."""
        if noise is not None:
            raise ValueError(f"codes take no noise, got one of {tuple(noise.shape)}")
        if generators is not None:
            require_generators(len(generators), len(codes))
        return self.mode(codes)  # [B, 1, h, w]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """latents: codes [B, 1, h, w] -> pixels [B, 3, H, W], clamped to [-1, 1].

        Raises ValueError for what is no code: a fraction, or a number outside 0 ... K - 1.
        """
        codes = self.mode(latents)  # [B, 1, h, w]
        whole = codes.round().long()  # [B, 1, h, w]
        least, most = whole.min().item(), whole.max().item()
        if least < 0 or most >= self.codebook_size or not torch.equal(whole.float(), codes):
            raise ValueError(
                f"codes must be whole numbers from 0 to {self.codebook_size - 1}, got {codes.min().item():g} to "
                f"{codes.max().item():g}"
            )
        return self._network.pixels_of(whole[:, 0]).clamp(-1, 1)  # [B, 3, H, W]
