"""Drawing codes from the discrete head: one number in [0, 1) per code, guidance on logits, and how sure a draw was.

Of the guided logits a, divided by the temperature, the codes that top-k and top-p leave have probabilities pi. A code
is the inverse of their cumulative sum at a uniform number u: how many cumulative shares are at most u. So an image
needs one number per code, whatever the codebook, and the same u gives the same code whatever else is drawn beside it.
The confidence of a draw is log pi + tau g with Gumbel noise g (MaskGIT, arXiv:2202.04200); one log pi serves the order
of tokens and policy gradients.

The noise of all units of the image is drawn for every iteration, also of those that are not asked for: which units are
hidden changes nothing about the others.

Shape letters: B images, G guidance branches, L units, D width, C codes of a unit, K codes of the codebook, r rows
(units), p units drawn in one iteration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models.compiled import compiled
from models.heads.base import Guide, HeadOutput

MAX_LOGITS = 1 << 26  # numbers held at once, of all branches: more rows are drawn in turn


class CodeLogits(Protocol):
    """What the sampler needs of a head. token_dim: C; codebook_size: K."""

    @property
    def token_dim(self) -> int: ...

    @property
    def codebook_size(self) -> int: ...

    def logits(self, z: Tensor) -> Tensor:
        """[..., D] -> [..., C, K]."""


@dataclass(frozen=True)
class CodeOptions:
    """temperature: logits are divided by it, above 0. top_k, top_p: see `filter_logits`. choice_temperature: tau, the
    factor on the noise of confidences."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    choice_temperature: float = 0.0

    @property
    def num_calls(self) -> int:
        """How often the head runs for a token."""
        return 1


@dataclass(frozen=True)
class CodeTrace:
    """log_probs: [B, L] float32, of each unit's codes in the iteration that unmasked it, guided, tempered and filtered
    as they were drawn; 0 where nothing was drawn."""

    log_probs: Tensor

    def write(self, token_ids: Tensor, record: Tensor) -> None:
        """Puts one iteration's units in their places; what is drawn again later is replaced. token_ids: [B, p];
        record: [r], r = B * p."""
        self.log_probs.scatter_(1, token_ids, record.view(token_ids.shape))


@dataclass(frozen=True)
class CodeSampler:
    """A `HeadSampler`. head: in the dtype of sampling, on `device`."""

    head: CodeLogits
    device: torch.device
    compile_mode: str | None = None

    @property
    def has_confidence(self) -> bool:
        return True

    @property
    def has_grid_noise(self) -> bool:
        return True

    def at(self, options: CodeOptions) -> CodeStep:
        """See `HeadSampler`."""
        return CodeStep(self, options)

    def empty_trace(self, batch_size: int, num_tokens: int, options: CodeOptions, device: torch.device) -> CodeTrace:
        """Room for the log-probabilities of all units."""
        return CodeTrace(torch.zeros(batch_size, num_tokens, device=device))  # [B, L]

    def logits(self, z: Tensor) -> Tensor:
        """[G, r, D] -> [G, r, C, K] float32."""
        if self.compile_mode is None:
            return self.head.logits(z).float()  # [G, r, C, K]
        return compiled(type(self.head).logits, self.compile_mode)(self.head, z).float()  # [G, r, C, K]


@dataclass(frozen=True)
class CodeStep:
    """A `HeadStep`."""

    sampler: CodeSampler
    options: CodeOptions

    def draw_noise(self, generators: Sequence[torch.Generator], num_tokens: int) -> Tensor:
        """C uniform numbers in [0, 1) per unit and one of Gumbel's distribution, last: [B, L, C + 1] float64 on the
        head's device."""
        drawn = [_unit_noise(each, num_tokens, self.sampler.head.token_dim) for each in generators]
        return torch.stack(drawn).to(self.sampler.device)  # [B, L, C + 1]

    def sample(self, z: Tensor, guide: Guide, noise: Tensor, record: bool = False) -> HeadOutput:
        """Draws r units. z: [G, r, D]; noise: [r, C + 1]; gives codes [r, C] as float32 whole numbers, the confidence
        [r], and as record the log-probability of each unit's codes [r]."""
        head = self.sampler.head
        size = max(1, MAX_LOGITS // (len(z) * head.token_dim * head.codebook_size))
        parts = [
            draw_codes(guide(self.sampler.logits(some)), chosen[:, :-1], self.options)
            for some, chosen in zip(z.split(size, dim=1), noise.split(size), strict=True)
        ]  # pairs of [size, C]
        codes, log_probs = (torch.cat(part) for part in zip(*parts, strict=True))  # each [r, C]
        log_prob = log_probs.sum(-1)  # [r]
        confidence = log_prob + (self.options.choice_temperature * noise[:, -1]).float()  # [r]
        return HeadOutput(codes.float(), confidence, log_prob if record else None)


def _unit_noise(generator: torch.Generator, num_units: int, num_codes: int) -> Tensor:
    """Of one image and iteration: [L, C + 1] float64 on the generator's device."""
    size = (num_units, num_codes + 1)
    shares = torch.rand(size, dtype=torch.float64, generator=generator, device=generator.device)  # [L, C + 1]
    inner = shares[:, -1:].clamp(min=torch.finfo(torch.float64).tiny)  # [L, 1]
    return torch.cat([shares[:, :-1], -(-inner.log()).log()], dim=1)  # [L, C + 1]


def code_log_probs(logits: Tensor, options: CodeOptions) -> Tensor:
    """Guided logits [..., K] -> log-probabilities of what is drawn from, [..., K], -inf for what is left out."""
    scaled = logits if options.temperature == 1 else logits / options.temperature  # [..., K]
    return filter_logits(scaled, options.top_k, options.top_p).log_softmax(-1)  # [..., K]


def draw_codes(logits: Tensor, uniforms: Tensor, options: CodeOptions) -> tuple[Tensor, Tensor]:
    """logits: guided, [r, C, K] float32; uniforms: [r, C] float64 in [0, 1). Gives codes [r, C] int64 and their
    log-probabilities [r, C] float32. A code of probability 0 is never drawn."""
    log_probs = code_log_probs(logits, options)  # [r, C, K]
    sums = log_probs.exp().double().cumsum(-1)  # [r, C, K]
    shares = sums / sums[..., -1:]  # [r, C, K]
    codes = torch.searchsorted(shares, uniforms[..., None].contiguous(), right=True)  # [r, C, 1]: shares up to u
    return codes[..., 0], log_probs.gather(-1, codes)[..., 0]  # each [r, C]


def filter_logits(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """-inf for all but the top_k largest (and their equals), then for all but the likeliest of these up to the first
    with which their share exceeds top_p. [..., K] -> [..., K]; None leaves all."""
    num_classes = logits.shape[-1]
    if top_k is not None and top_k < num_classes:
        least = logits.topk(top_k, dim=-1).values[..., -1:]  # [..., 1]
        logits = logits.masked_fill(logits < least, -torch.inf)  # [..., K]
    if top_p is not None and top_p < 1:
        ordered, places = logits.sort(dim=-1, descending=True, stable=True)  # each [..., K]
        share = ordered.softmax(-1).cumsum(-1)  # [..., K]
        is_late = torch.zeros_like(share, dtype=torch.bool)  # [..., K]
        is_late[..., 1:] = share[..., :-1] > top_p
        logits = logits.masked_fill(is_late.scatter(-1, places, is_late), -torch.inf)  # [..., K]
    return logits
