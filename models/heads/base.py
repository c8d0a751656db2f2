"""What a token head is: the part of the model that knows what a token is made of.

The trunk turns visible tokens and conditions into one vector z per token. A head embeds tokens for the trunk, gives the
training loss of tokens under their z, and draws tokens from z. The diffusion head (`diffloss.py`,
`diffusion_sampler.py`) has continuous tokens, the discrete one (`discrete.py`, `discrete_sampler.py`) codes; `build.py`
makes what a config asks for.

Shape letters: B images, G guidance branches, L image tokens, C token channels, D trunk width, r rows (tokens),
p tokens drawn in one iteration, M noisy copies of a token in training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Guide = Callable[[Tensor], Tensor]
"""Predictions of all guidance branches [G, r, ...] -> the guided one [r, ...]."""


class LossNoise(Protocol):
    """What is random about a loss, drawn before it: opaque to everybody but the head that drew it."""

    def to(self, device: torch.device | str) -> LossNoise: ...


@dataclass(frozen=True)
class HeadOutput:
    """tokens: [r, C]. confidence: [r], higher is surer; None from a head that has none. record: what the head keeps of
    the draw, for `HeadTrace.write`; None unless asked for."""

    tokens: Tensor
    confidence: Tensor | None = None
    record: Any = None


class HeadTrace(Protocol):
    """How the tokens of a batch came about, by token position; later their log-probabilities are computed from it."""

    def write(self, token_ids: Tensor, record: Any) -> None:
        """Puts the record of one iteration's tokens in their places. token_ids: [B, p]."""


class HeadStep(Protocol):
    """A head at the options of one iteration of the sampler."""

    def draw_noise(self, generators: Sequence[torch.Generator], num_tokens: int) -> Tensor:
        """All randomness of `num_tokens` tokens an image, each image's from its own generator: [..., B, p, C]."""

    def sample(self, z: Tensor, guide: Guide, noise: Tensor, record: bool = False) -> HeadOutput:
        """Draws r tokens. z: [G, r, D]; noise: [..., r, C], of `draw_noise` with images and tokens flattened."""


class HeadSampler(Protocol):
    """A head prepared for sampling (dtype, packed weights, compiled code). Options are the head's own.

    has_confidence: its draws say how sure they were. has_grid_noise: the noise of an iteration is drawn for all tokens
    of an image, those too that are not drawn in it."""

    @property
    def has_confidence(self) -> bool: ...

    @property
    def has_grid_noise(self) -> bool: ...

    def at(self, options: Any) -> HeadStep:
        """What does not depend on the tokens is computed here, before the sampler's loop."""

    def empty_trace(self, batch_size: int, num_tokens: int, options: Any, device: torch.device) -> HeadTrace: ...


class TokenHead(Protocol):
    """token_dim: C; z_dim: D, channels of the condition z. Training: `sample_noise`, then `token_loss`. Sampling:
    `sampler`."""

    @property
    def token_dim(self) -> int: ...

    @property
    def z_dim(self) -> int: ...

    def empty_tokens(self, batch_size: int, num_tokens: int, device: torch.device) -> Tensor:
        """Stand-ins for tokens that are not known yet, never looked at: [B, L, C]."""

    def sample_noise(self, num_rows: int, generator: torch.Generator) -> LossNoise:
        """What is random about the loss of `num_rows` rows, on the generator's device."""

    def token_loss(self, target: Tensor, z: Tensor, noise: Any) -> Tensor:
        """Loss of each row [r] float32, M copies of all tokens in turn. target: [r / M, C] clean; z: [r / M, D]; noise:
        of `sample_noise`."""

    def prediction(self, target: Tensor, z: Tensor, noise: Any) -> Tensor:
        """What `token_loss` looks at: the head's output for each row, [r, ...]; arguments as there."""

    def guided(self, predictions: Tensor, guide: Guide) -> Tensor:
        """Predictions of all guidance branches [G, r, ...], the full one's first -> the one that tokens are drawn from,
        [r, ...]."""

    def distance(self, prediction: Tensor, wanted: Tensor, noise: Any) -> Tensor:
        """How far each row's prediction is from the one that is wanted: [r] float32, 0 where they are equal. Both:
        [r, ...], at one `noise`."""

    def sampler(self, cast_head: Any, compile_mode: str | None) -> HeadSampler:
        """cast_head: this head in the dtype of sampling (itself for float32). compile_mode: None for eager."""
