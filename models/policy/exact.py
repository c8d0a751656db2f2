"""Exact log-probabilities of codes, each in the iteration that drew it:

    l_i = log pi(c_i | codes of earlier iterations),    pi = softmax(guided logits / temperature).

An iteration draws its codes independently of each other, and the order does not look at the model, so the sum over an
image's codes is the log-probability of the image in its order. One pass over the backbone for each iteration scores
every code once.

Left out: orders by confidence, whose choice of tokens has a probability too, and top-k and top-p, under which other
weights may not be able to draw what was drawn.

Shape letters: n images, L tokens, C codes of a token, K codes of the codebook, p tokens scored in one pass.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from models.blocks import gather_tokens
from models.heads.discrete_sampler import CodeOptions, CodeTrace, code_log_probs
from models.policy.base import PolicyOutput, Samples, ScoringNoise, check_masks, draw_iterations
from models.sampling.config import SamplingConfig, guidance_scales
from models.sampling.guidance import choose_branches, combine_branches
from models.sampling.orders import iteration_ids
from models.structmar import StructMAR


@dataclass(frozen=True)
class ExactEstimator:
    """See the module's docstring. config: the rollout's. num_masks: passes; `num_iter` scores each code once, fewer are
    iterations drawn in proportion to their tokens, so that the mean over them is unbiased. has_distribution: outputs
    keep the log-probabilities of all K codes, for the exact KL.

    What to know: the policy is the guided one. Only the fully conditioned branch gets a gradient; the others are
    computed without.
    """

    config: SamplingConfig
    num_masks: int
    has_distribution: bool = False

    def __post_init__(self) -> None:
        check_masks(self.num_masks, self.config.num_iter)
        if self.config.head != self.head:
            raise ValueError(
                f"the exact estimator scores codes, but the sampling options are of the {self.config.head} head"
            )
        self.config.require_exact()

    @property
    def head(self) -> str:
        return "discrete"

    @property
    def needs_trace(self) -> bool:
        return True

    @property
    def num_draws(self) -> int:
        return 1

    def draw_noise(self, samples: Samples, generator: torch.Generator) -> list[ScoringNoise]:
        """See `Estimator`. With a pass for each iteration nothing is drawn."""
        num_tokens, num_iter = samples.orders.shape[1], self.config.num_iter
        counts = self.config.masked_counts(num_tokens)
        if self.num_masks < num_iter:
            iterations = draw_iterations(counts, self.num_masks, generator)
            weights = [1.0] * self.num_masks
        else:
            iterations = list(range(num_iter))
            weights = [num_iter * (counts[each] - counts[each + 1]) / num_tokens for each in iterations]
        passes = []
        for iteration, weight in zip(iterations, weights, strict=True):
            kept_ids, token_ids = iteration_ids(samples.orders, counts, iteration)  # [n, L - m], [n, p]
            timesteps = token_ids.new_zeros(*token_ids.shape, 0)  # [n, p, 0]
            passes.append(ScoringNoise(kept_ids, token_ids, timesteps, None, None, iteration, weight))
        return passes

    def log_probs(self, model: StructMAR, samples: Samples, noise: ScoringNoise) -> PolicyOutput:
        """One pass: log_prob [n, p, C], and code_log_probs [n, p, C, K] if asked for."""
        if noise.noise is not None or noise.steps is not None:
            raise ValueError("this noise is another estimator's: it has noises or reverse steps, codes have none")
        assert not model.training, "log-probabilities need model.eval()"
        logits = self._guided_logits(model, samples, noise)  # [n, p, C, K]
        log_probs = code_log_probs(logits, CodeOptions(self.config.temperature))  # [n, p, C, K]
        codes = gather_tokens(samples.tokens, noise.token_ids).long()  # [n, p, C]
        log_prob = log_probs.gather(-1, codes[..., None]).squeeze(-1)  # [n, p, C]
        return PolicyOutput(log_prob, code_log_probs=log_probs if self.has_distribution else None)

    def replay_gap(self, samples: Samples, noise: ScoringNoise, log_prob: Tensor) -> Tensor | None:
        """See `Estimator`."""
        if not isinstance(samples.trace, CodeTrace):
            return None
        recorded = samples.trace.log_probs.gather(1, noise.token_ids)  # [n, p], of a token's codes together
        return (recorded - log_prob.sum(-1)).abs().max()

    def _guided_logits(self, model: StructMAR, samples: Samples, noise: ScoringNoise) -> Tensor:
        """[n, p, C, K] float32."""
        num_tokens = samples.orders.shape[1]
        names, config = choose_branches(self.config, samples.text is not None, samples.layout is not None)
        if config.branch_uses(len(names))[noise.iteration] == "full only":
            names = ("full",)
        logits = {}
        for name in names:
            with nullcontext() if name == "full" else torch.no_grad():
                logits[name] = model.code_logits(
                    samples.tokens,
                    noise.kept_ids,
                    noise.token_ids,
                    text=None if name == "null" else samples.text,
                    layout=samples.layout if name == "full" else None,
                    grid=samples.grid,
                )  # [n, p, C, K]
        next_masked = config.masked_counts(num_tokens)[noise.iteration + 1]
        return combine_branches(logits, *guidance_scales(config, num_tokens, next_masked, noise.iteration))
