"""The discrete head: each token is a code of a learned codebook, or several, and has a class distribution per code.

The loss is the cross-entropy of the codes (MaskGIT, arXiv:2202.04200), with label smoothing. There is no class for
"hidden": the trunk's mask token stands in for hidden codes, so that none can be drawn. Codes travel as float32 whole
numbers, as latents do, and become integers only here.

Where several codes make a token of the trunk (n = p * p), a linear turns its vector into one of E channels per code,
and one matrix without bias scores all codes alike. It starts at zero: at first every code is equally likely.

Shape letters: r rows, R rows with padding, C codes of a row, n codes of a trunk token, D trunk width, E channels of a
code, K codebook.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.heads.base import Guide
from models.heads.discrete_sampler import CodeSampler

INIT_STD = 0.02
ROW_MULTIPLE = 512  # of the rows of a loss: libraries keep what they prepared for every shape, and steps differ in rows


@dataclass(frozen=True)
class NoNoise:
    """A `LossNoise`: nothing about the loss is random."""

    def to(self, device: torch.device | str) -> NoNoise:
        return self


class CodeEmbedding(nn.Module):
    """Codes into the trunk: a row per code; several codes of a token are joined by a linear.

    code_dim: E; not used for a single code, whose row has the trunk's width. can_hide: a token may be known in part;
    its hidden codes are a learned row.
    """

    def __init__(self, codebook_size: int, num_codes: int, code_dim: int, width: int, can_hide: bool) -> None:
        super().__init__()
        self.codes = nn.Embedding(codebook_size, width if num_codes == 1 else code_dim)
        nn.init.normal_(self.codes.weight, std=INIT_STD)
        self.joint = None if num_codes == 1 else nn.Linear(num_codes * code_dim, width)
        if can_hide:
            self.hidden = nn.Parameter(torch.empty(code_dim).normal_(std=INIT_STD))

    def forward(self, codes: Tensor, known: Tensor | None = None) -> Tensor:
        """codes: [..., n] whole numbers below K; known: [..., n] bool, None where all are; gives [..., D]."""
        rows = self.codes(codes.long())  # [..., n, E]
        if known is not None:
            rows = torch.where(known[..., None], rows, self.hidden)  # [..., n, E]
        return rows.squeeze(-2) if self.joint is None else self.joint(rows.flatten(-2))  # [..., D]


class DiscreteHead(nn.Module):
    """A `TokenHead`. token_dim: C, the codes that are hidden and drawn together. codes_per_token: n.

    With C < n the trunk splits its tokens (`split`) before it asks for rows of one code each.
    """

    def __init__(
        self,
        codebook_size: int,
        token_dim: int,
        codes_per_token: int,
        width: int,
        code_dim: int,
        label_smoothing: float,
    ) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.token_dim = token_dim
        self.codes_per_token = codes_per_token
        self.label_smoothing = label_smoothing
        channels = width if codes_per_token == 1 else code_dim
        self.z_dim = width if token_dim == codes_per_token else channels
        self.to_codes = None if codes_per_token == 1 else nn.Linear(width, codes_per_token * channels)
        if self.to_codes is not None:
            nn.init.normal_(self.to_codes.weight, std=INIT_STD)
            nn.init.zeros_(self.to_codes.bias)
        self.out = nn.Linear(channels, codebook_size, bias=False)
        nn.init.zeros_(self.out.weight)

    def empty_tokens(self, batch_size: int, num_tokens: int, device: torch.device) -> Tensor:
        """Stand-ins for codes that are not known yet: [B, L, C] float32."""
        return torch.zeros(batch_size, num_tokens, self.token_dim, device=device)  # [B, L, C]

    def sample_noise(self, num_rows: int, generator: torch.Generator) -> NoNoise:
        """Draws nothing."""
        return NoNoise()

    def split(self, z: Tensor) -> Tensor:
        """A trunk token's vector into one per code: [..., D] -> [..., n, E]."""
        return z[..., None, :] if self.to_codes is None else self.to_codes(z).unflatten(-1, (self.codes_per_token, -1))

    def logits(self, z: Tensor) -> Tensor:
        """Unnormalised log-probabilities of each code of a row. z: [..., z_dim]; gives [..., C, K]."""
        return self.out(self.split(z) if self.token_dim == self.codes_per_token else z[..., None, :])  # [..., C, K]

    def token_loss(self, target: Tensor, z: Tensor, noise: NoNoise) -> Tensor:
        """Smoothed cross-entropy in nats, the mean over a row's codes: [r] float32. target: [r, C]; z: [r, z_dim]."""
        padded = F.pad(z, (0, 0, 0, -len(z) % ROW_MULTIPLE))  # [R, z_dim]
        logits = self.logits(padded)[: len(z)].float().flatten(0, 1)  # [r * C, K]
        codes = target.long().flatten()  # [r * C]
        loss = F.cross_entropy(logits, codes, reduction="none", label_smoothing=self.label_smoothing)  # [r * C]
        return loss.view(target.shape).mean(-1)  # [r]

    def prediction(self, target: Tensor, z: Tensor, noise: NoNoise) -> Tensor:
        """Logits of each row's codes, [r, C, K] float32; see `TokenHead`."""
        padded = F.pad(z, (0, 0, 0, -len(z) % ROW_MULTIPLE))  # [R, z_dim]
        return self.logits(padded)[: len(z)].float()  # [r, C, K]

    def guided(self, predictions: Tensor, guide: Guide) -> Tensor:
        """Guidance acts on logits. [G, r, C, K] -> [r, C, K]."""
        return guide(predictions)  # [r, C, K]

    def distance(self, prediction: Tensor, wanted: Tensor, noise: NoNoise) -> Tensor:
        """The KL divergence in nats from the wanted distribution of codes, the mean over a row's codes: [r]."""
        wanted_log_probs, log_probs = wanted.log_softmax(-1), prediction.log_softmax(-1)  # each [r, C, K]
        return F.kl_div(log_probs, wanted_log_probs, reduction="none", log_target=True).sum(-1).mean(-1)  # [r]

    def sampler(self, cast_head: DiscreteHead, compile_mode: str | None) -> CodeSampler:
        """See `TokenHead`."""
        return CodeSampler(cast_head, cast_head.out.weight.device, compile_mode)
