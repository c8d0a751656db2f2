"""Log-probabilities of sampled tokens under a StructMAR, with gradients: what a policy gradient needs of the model.

Codes have exact log-probabilities (`exact.py`). A continuous token has no likelihood at hand, since it comes out of a
diffusion head. Two estimators stand in for it: `elbo.py` scores finished tokens, `trajectory.py` the recorded reverse
steps.

All rebuild the backbone's inputs from the final tokens and the order alone: a token never changes once it is drawn.
Random choices (`ScoringNoise`) are made once and shared by the old, the current and the reference policy, so that at
equal weights their log-probabilities are equal to the bit; with choices of their own the ratio would be noise.
Left out: the probability of the order (it is drawn uniformly). The model must be in eval mode (dropout would be a
different policy at every call).

Shape letters: n images, L image tokens, C token channels, m masked tokens, p tokens scored in one pass of the backbone,
K noises (or reverse steps) per token, S reverse steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from models.heads.base import HeadTrace
from models.sampling.sampler import SampleOutput
from models.structmar import StructMAR, TrainingNoise
from util.types import LayoutBatch, SizeBatch, TextContext


@dataclass(frozen=True)
class Samples:
    """Sampled images and what they were sampled for.

    tokens: [n, L, C] float32, the final ones, of a (rows, columns) grid. orders: [n, L] int64, unmasked from the end.
    text, layout: n rows each. trace: how they came about, n rows, if recorded.
    """

    tokens: Tensor
    orders: Tensor
    grid: tuple[int, int]
    text: TextContext | None
    layout: LayoutBatch | None
    trace: HeadTrace | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def rows(self, chosen: Tensor) -> Samples:
        """chosen: [m] int64 -> these images alone, without the trace."""
        text = None if self.text is None else self.text.rows(chosen)
        layout = None if self.layout is None else self.layout.map(lambda part: part[chosen])
        return Samples(self.tokens[chosen], self.orders[chosen], self.grid, text, layout)


def collect_samples(output: SampleOutput, text: TextContext | None, layout: LayoutBatch | None) -> Samples:
    """The sampler's output as Samples; text and layout are those it was given."""
    return Samples(output.tokens, output.orders, output.grid, text, layout, output.trace)


@dataclass(frozen=True)
class PolicyOutput:
    """The log-probabilities of one pass, one per ratio, and the network's prediction behind them.

    log_prob: [n, p] (elbo), [n, p, K] (trajectory) or [n, p, C] (exact) float32. mean: [n, p, K, C] float32, the
    predicted noise (elbo) or the mean of the next state (trajectory). log_std: [n, p, K, C], trajectory only.
    code_log_probs: [n, p, C, codes of the codebook], exact only, where the KL needs them.
    """

    log_prob: Tensor
    mean: Tensor | None = None
    log_std: Tensor | None = None
    code_log_probs: Tensor | None = None


@dataclass(frozen=True)
class ScoringNoise:
    """Everything random about one pass; drawn once, shared by the old, the current and the reference policy.

    kept_ids: [n, L - m], the visible tokens. token_ids: [n, p], the scored ones. timesteps: [n, p, K] int64, what the
    network is told (K = 0 for exact). noise: [n, p, K, C] (elbo) or None. steps: K indices into `reverse_steps`
    (trajectory) or None. iteration: the sampler's iteration that the pass belongs to. weight: of the pass's mean among
    the passes, 1 on average.
    """

    kept_ids: Tensor
    token_ids: Tensor
    timesteps: Tensor
    noise: Tensor | None
    steps: tuple[int, ...] | None
    iteration: int
    weight: float = 1.0


class Estimator(Protocol):
    """head: whose tokens it scores, of `HEADS`. needs_trace: the samples must have been recorded
    (`sample(..., record=True)`). num_masks: passes of the backbone. num_draws: per token; None: all reverse steps that
    may be scored."""

    @property
    def head(self) -> str: ...

    @property
    def needs_trace(self) -> bool: ...

    @property
    def num_masks(self) -> int: ...

    @property
    def num_draws(self) -> int | None: ...

    def draw_noise(self, samples: Samples, generator: torch.Generator) -> list[ScoringNoise]:
        """The random choices, one entry per pass of the backbone. They are drawn on the generator's device."""

    def log_probs(self, model: StructMAR, samples: Samples, noise: ScoringNoise) -> PolicyOutput:
        """One pass, with gradients if they are enabled."""

    def replay_gap(self, samples: Samples, noise: ScoringNoise, log_prob: Tensor) -> Tensor | None:
        """How far `log_probs` of the weights that sampled is from what was recorded then: the largest difference, a
        scalar; None if nothing was recorded."""


def draw_iterations(counts: Sequence[int], num_masks: int, generator: torch.Generator) -> list[int]:
    """`num_masks` iterations of the sampler, ascending, stratified over the tokens in the order they are unmasked.

    Position u_j = (j + U_j) / num_masks of the L tokens falls into the iteration that unmasks that token, so an
    iteration is hit in proportion to the tokens it unmasks: the mean over passes of the mean over a pass's tokens is,
    in expectation, the mean over all tokens. counts: of `masked_counts`.
    """
    num_tokens = counts[0]
    uniform = torch.rand(num_masks, dtype=torch.float64, generator=generator, device=generator.device)
    positions = [(index + u) / num_masks * num_tokens for index, u in enumerate(uniform.tolist())]
    return [sum(1 for hidden in counts[1:-1] if num_tokens - hidden <= position) for position in positions]


def check_masks(num_masks: int, num_iter: int) -> None:
    if num_iter < 1:
        raise ValueError(f"num_iter must be at least 1, got {num_iter}")
    if not 1 <= num_masks <= num_iter:
        raise ValueError(f"num_masks must lie between 1 and num_iter = {num_iter}, got {num_masks}")


@dataclass(frozen=True)
class LossInputs:
    """The arguments of `StructMAR.forward`."""

    latents: Tensor
    noise: TrainingNoise
    labels: Tensor | None = None
    text: TextContext | None = None
    layout: LayoutBatch | None = None
    sizes: SizeBatch | None = None


class Policy(nn.Module):
    """A model and an estimator behind one `forward`, since wrappers such as DDP act on `forward` alone."""

    def __init__(self, model: StructMAR, estimator: Estimator) -> None:
        super().__init__()
        if model.config.head != estimator.head:
            raise ValueError(f"an estimator of the {estimator.head} head with a model of the {model.config.head} head")
        self.model = model
        self.estimator = estimator

    def forward(self, inputs: Samples | LossInputs, noise: ScoringNoise | None = None) -> PolicyOutput | Tensor:
        """Samples with the noise of one pass give a PolicyOutput; LossInputs give the model's own loss, a scalar."""
        if isinstance(inputs, LossInputs):
            return self.model(inputs.latents, inputs.noise, inputs.labels, inputs.text, inputs.layout, inputs.sizes)
        if noise is None:
            raise ValueError("the log-probabilities of samples need noise")
        return self.estimator.log_probs(self.model, inputs, noise)
