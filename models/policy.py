"""Log-probabilities of sampled tokens under a StructMAR: what a policy gradient needs of the model.

Shape letters: n images, L image tokens, C token channels, p tokens scored in one pass of the backbone, K draws (noise
draws or reverse steps) per token, S reverse steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from models.sampling import Trace
from util.types import LayoutBatch, TextContext


@dataclass(frozen=True)
class Samples:
    """Sampled images and what they were sampled for.

    tokens: [n, L, C] float32, the final ones. orders: [n, L] int64, uncovered from the end. text, layout: n rows each.
    trace: the reverse processes, n rows, if recorded.
    """

    tokens: Tensor
    orders: Tensor
    text: TextContext | None
    layout: LayoutBatch | None
    trace: Trace | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]


@dataclass(frozen=True)
class PolicyOutput:
    """The log-probabilities of one pass, one per ratio, and the network's prediction behind them.

    log_prob: [n, p] (elbo) or [n, p, K] (trajectory) float32. mean: [n, p, K, C] float32, the predicted noise (elbo) or
    the mean of the next state (trajectory). log_std: [n, p, K, C], trajectory only.
    """

    log_prob: Tensor
    mean: Tensor
    log_std: Tensor | None = None


@dataclass(frozen=True)
class Draws:
    """Everything random about one pass; drawn once, shared by the old, the current and the reference policy.

    kept_ids: [n, L - m], the visible tokens. token_ids: [n, p], the scored ones. timesteps: [n, p, K] int64, what the
    network is told. noise: [n, p, K, C] (elbo) or None. steps: K indices into `reverse_steps` (trajectory) or None.
    iteration: the sampler's iteration that the pass belongs to.
    """

    kept_ids: Tensor
    token_ids: Tensor
    timesteps: Tensor
    noise: Tensor | None
    steps: tuple[int, ...] | None
    iteration: int
