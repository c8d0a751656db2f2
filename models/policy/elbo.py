"""Log-probabilities of finished tokens by their denoising error, at shared noise levels and noises:

    l = -kappa / K * sum_k || eps_k - eps_theta(sqrt(bar_k) x + sqrt(1 - bar_k) eps_k, t_k, z) ||^2.

Left out: the variational terms of the training loss.

Shape letters: n images, L image tokens, C token channels, m masked tokens, p tokens scored in one pass of the backbone,
K noises per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.blocks import gather_tokens
from models.config import NUM_TRAIN_STEPS
from models.policy.base import PolicyOutput, Samples, ScoringNoise, check_masks, draw_iterations
from models.sampling.schedules import masked_counts
from models.structmar import StructMAR


@dataclass(frozen=True)
class ElboEstimator:
    """Scores all masked tokens of `num_masks` masks of the rollout by their denoising error; the log-probability of a
    token is its mean over `num_draws` pairs (t, eps), taken before the ratio is.

    num_iter: the sampler's. num_draws: even; half as many timesteps, stratified, are each used with eps and with -eps.
    kappa: scale of the log-probability, hence of ratio and KL. schedule: the sampler's, of `config.SCHEDULES`. t_range:
    timesteps are drawn from t_range[0] up to below t_range[1], of 1000.

    What to know: (1) The difference of two such log-probabilities holds the error of the Monte Carlo mean, so k3 of it
    is a penalty on the change of eps, not a KL divergence in nats. (2) Samples drawn with guidance are off-policy for
    these unguided log-probabilities, and the temperature is ignored: allowed, but a caller should say so. (3) Uniform t
    scales the score's gradient by a factor below 1 that depends on the data's density; it is exact in direction only
    for a shift of the mean. (4) A lower bound: for negative advantages, widening the bound's gap lowers the objective
    too, so keep the clip and the KL. (5) At small t the noise cannot be predicted and the token is all but known: the
    error is largest there and says least about the reward. A range that leaves small t out has a steadier gradient; the
    KL, at the same draws, then does not see them either.
    """

    num_iter: int
    num_masks: int = 4
    num_draws: int = 8
    kappa: float = 1.0
    schedule: str = "mar"
    t_range: tuple[int, int] = (0, NUM_TRAIN_STEPS)

    def __post_init__(self) -> None:
        check_masks(self.num_masks, self.num_iter)
        if self.num_draws < 2 or self.num_draws % 2:
            raise ValueError(f"num_draws must be even and at least 2, got {self.num_draws}")
        low, high = self.t_range
        if not 0 <= low < high <= NUM_TRAIN_STEPS:
            raise ValueError(f"t_range must be within 0 and {NUM_TRAIN_STEPS}, the smaller first, got {low} and {high}")
        if not self.kappa > 0:
            raise ValueError(f"kappa must be positive, got {self.kappa}")

    @property
    def head(self) -> str:
        return "diffusion"

    @property
    def needs_trace(self) -> bool:
        return False

    def draw_noise(self, samples: Samples, generator: torch.Generator) -> list[ScoringNoise]:
        """See `Estimator`. All images share the sizes of the masks; orders, timesteps and noises are their own."""
        counts = masked_counts(self.schedule, samples.orders.shape[1], self.num_iter)
        iterations = draw_iterations(counts, self.num_masks, generator)
        return [self._draw_pass(samples, counts[iteration], iteration, generator) for iteration in iterations]

    def _draw_pass(self, samples: Samples, num_masked: int, iteration: int, generator: torch.Generator) -> ScoringNoise:
        orders, device = samples.orders, samples.tokens.device
        half, source = self.num_draws // 2, generator.device
        low, high = self.t_range
        shape = (len(samples), num_masked, half)
        uniform = torch.rand(shape, generator=generator, device=source)  # [n, m, K / 2]
        strata = torch.arange(half, device=source)  # [K / 2]
        above = ((strata + uniform) * ((high - low) / half)).long().clamp(max=high - low - 1)  # [n, m, K / 2]
        timesteps = low + above  # [n, m, K / 2]
        noise = torch.randn(*shape, samples.tokens.shape[2], generator=generator, device=source)  # [n, m, K / 2, C]
        return ScoringNoise(
            kept_ids=orders[:, num_masked:].sort(dim=1).values,
            token_ids=orders[:, :num_masked].sort(dim=1).values,
            timesteps=torch.cat([timesteps, timesteps], dim=2).to(device),
            noise=torch.cat([noise, -noise], dim=2).to(device),
            steps=None,
            iteration=iteration,
        )

    def log_probs(self, model: StructMAR, samples: Samples, noise: ScoringNoise) -> PolicyOutput:
        """One pass: log_prob [n, p], mean (the predicted eps) [n, p, K, C]."""
        if noise.noise is None:
            raise ValueError("this noise is another estimator's: it has reverse steps instead of noises")
        assert not model.training, "log-probabilities need model.eval()"
        target = gather_tokens(samples.tokens, noise.token_ids)[:, :, None]  # [n, p, 1, C]
        noisy = model.diffloss.add_noise(target, noise.timesteps, noise.noise)  # [n, p, K, C]
        output = model.denoise(
            samples.tokens,
            noise.kept_ids,
            noise.token_ids,
            noisy,
            noise.timesteps,
            text=samples.text,
            layout=samples.layout,
            grid=samples.grid,
        )  # [n, p, K, 2C]
        eps = output.float().chunk(2, dim=-1)[0]  # [n, p, K, C]
        errors = (noise.noise - eps).square().sum(-1)  # [n, p, K]
        return PolicyOutput(-self.kappa * errors.mean(-1), eps)

    def replay_gap(self, samples: Samples, noise: ScoringNoise, log_prob: Tensor) -> Tensor | None:
        """See `Estimator`. Nothing of it happens while sampling."""
        return None
