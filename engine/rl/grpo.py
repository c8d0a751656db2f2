"""Group relative policy optimisation: advantages, the clipped surrogate and the penalty for leaving the reference.

Of B prompts with G images each (Shao et al. 2024, arXiv:2402.03300):

    A_bg = (r_bg - mean_g r_b) / std_g r_b
    L    = -mean min(rho A, clip(rho, 1 - e, 1 + e) A) + beta KL,    rho = exp(lp - lp_old)

with the dual clip of Ye et al. 2020 (arXiv:1912.09729) for A < 0. The log-probabilities come from models/policy/, one
per ratio; old ones are computed once, right after the rollout, at the draws that all inner steps use. The KL stands in
the loss: in the reward it would be normalised away with it, together with whatever noise it carries.

Pure functions of tensors, without model, loop or communication between processes. Left out: value
networks, weights per reverse step, and the removal of groups of equal rewards (their advantages are 0, which is the
same for the gradient, and keeps the number of backward passes equal on all processes).

Shape letters: B prompts, G samples per prompt, n = B*G images (image b*G + g is sample g of prompt b), p tokens scored
in a pass, K draws per token, C token channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.rl.settings import ADV_NORMS, KL_ESTIMATORS

if TYPE_CHECKING:
    from models.policy.base import PolicyOutput

STD_FLOOR = 1e-4  # added to a standard deviation before dividing by it
MAX_LOG_RATIO = 20.0  # exp(20) is far outside any clip range, and far from overflow


def group_advantages(rewards: Tensor, norm: str, batch_std: float | None = None, clip: float = 5.0) -> Tensor:
    """How much better each image is than the others of its prompt, within -clip and clip.

    rewards: [B, G] float32 -> [B, G]. norm is one of ADV_NORMS:
      zscore: (r - group mean) / (group std + 1e-4), the std without Bessel's correction, so |A| <= sqrt(G - 1);
      center: r - group mean (Liu et al. 2025, arXiv:2503.20783, argue that the std favours easy and hard prompts);
      batch: (r - group mean) / (batch_std + 1e-4), the caller's std over all processes' centred rewards;
      none: r.
    A group of equal rewards gets exactly 0 but for "none". Raises ValueError for another norm or shape, rewards that
    are not finite, groups of one image (nothing to compare with) and a missing batch_std.
    """
    if norm not in ADV_NORMS:
        raise ValueError(f"norm must be one of {', '.join(ADV_NORMS)}, got {norm!r}")
    if not clip > 0:
        raise ValueError(f"clip must be above 0, got {clip}")
    _check_rewards(rewards)
    if norm == "none":
        return rewards.clamp(-clip, clip)  # [B, G]
    if rewards.shape[1] < 2:
        raise ValueError(f"advantages of norm {norm!r} compare images of one prompt: G must be >= 2, got 1")
    centred = rewards - rewards.mean(1, keepdim=True)  # [B, G]
    centred = centred.masked_fill(_is_flat(rewards)[:, None], 0.0)  # [B, G]; the mean of equal numbers may be rounded
    if norm == "zscore":
        centred = centred / (rewards.std(1, correction=0, keepdim=True) + STD_FLOOR)  # [B, G]
    elif norm == "batch":
        if batch_std is None or not math.isfinite(batch_std) or batch_std < 0:
            raise ValueError(f"norm 'batch' needs batch_std, finite and not negative, got {batch_std}")
        centred = centred / (batch_std + STD_FLOOR)  # [B, G]
    return centred.clamp(-clip, clip)  # [B, G]


def zero_std_share(rewards: Tensor) -> float:
    """rewards: [B, G] -> the share of prompts whose G rewards are all equal: they teach nothing."""
    _check_rewards(rewards)
    return float(_is_flat(rewards).float().mean())


@dataclass(frozen=True)
class Surrogate:
    """loss: scalar, the mean of the negated clipped objective.

    stats: detached scalars over all ratios: ratio_mean, ratio_min, ratio_max, log_ratio_std, clip_high and clip_low
    (shares of the entries whose gradient is removed because the ratio is too high or too low), approx_kl (the mean of
    (rho - 1) - log rho: how far the policy went from the one that sampled).
    """

    loss: Tensor
    stats: dict[str, Tensor]


def clipped_surrogate(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    clip_range: float,
    dual_clip: float | None = 3.0,
) -> Surrogate:
    """PPO's clipped objective, negated, with a bound for negative advantages.

    log_prob, old_log_prob: [n, ...], one per ratio; advantages: [n], the same for all ratios of an image, or [n, p], of
    a token's ratios. The objective is min(rho A, clip(rho, 1 - clip_range, 1 + clip_range) A); where A < 0 it is at
    least dual_clip * A, so that a ratio that ran away cannot dominate the mean (None: no such bound). log rho is cut at
    +-20.
    Raises ValueError for shapes that do not fit, an old_log_prob with a gradient (then rho would have none), and
    clip_range <= 0 or dual_clip <= 1.
    """
    _check_surrogate(log_prob, old_log_prob, advantages, clip_range, dual_clip)
    log_ratio = (log_prob - old_log_prob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)  # [n, ...]
    ratio = log_ratio.exp()  # [n, ...]
    advantage = advantages.detach()  # [n] or [n, p]
    advantage = advantage.reshape(*advantage.shape, *[1] * (log_prob.dim() - advantage.dim()))  # [n, 1, ...]
    objective = torch.minimum(ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)  # [n, ...]
    if dual_clip is not None:
        bounded = torch.maximum(objective, dual_clip * advantage)  # [n, ...]
        objective = torch.where(advantage < 0, bounded, objective)  # [n, ...]
    stats = _ratio_stats(log_ratio.detach(), advantage, clip_range, math.inf if dual_clip is None else dual_clip)
    return Surrogate(-objective.mean(), stats)


def kl_penalty(kind: str, current: PolicyOutput, reference: PolicyOutput) -> Tensor:
    """How far the policy is from the reference at the same draws: a scalar mean, 0 with gradient 0 where both agree.

    kind is one of KL_ESTIMATORS; q = lp_ref - lp, cut at +-20:
      k2: q^2 / 2, k3: exp(q) - q - 1 (Schulman 2020, joschu.net/blog/kl-approx.html), per log-probability. The value of
        k3 estimates KL(current || reference) without bias where the actions are the current policy's own; its gradient
        is not that of the KL, k2's is. Of the elbo estimator both are penalties that grow with the distance of the
        predictions, not nats: q carries the noise of its draws.
      eps: ||eps - eps_ref||^2 summed over C, per draw: the elbo estimator's outputs only.
      exact: KL(N(mu, s) || N(mu_ref, s_ref)) summed over C, per reverse step, of the trajectory estimator's outputs;
        KL(pi || pi_ref) over all codes, per code, of the exact estimator's.
    Raises ValueError for another kind, outputs that lack what it needs, shapes that differ, and a reference with a
    gradient.
    """
    if kind not in KL_ESTIMATORS:
        raise ValueError(f"kind must be one of {', '.join(KL_ESTIMATORS)}, got {kind!r}")
    if kind in ("k2", "k3"):
        _check_pair("log_prob", current.log_prob, reference.log_prob)
        q = (reference.log_prob - current.log_prob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)  # [n, p] or [n, p, K]
        return (0.5 * q.square() if kind == "k2" else torch.expm1(q) - q).mean()
    if kind == "exact" and current.code_log_probs is not None and reference.code_log_probs is not None:
        return _code_divergence(current.code_log_probs, reference.code_log_probs)
    if current.mean is None or reference.mean is None:
        raise ValueError(f"the KL estimator {kind!r} needs what the network predicted: these are outputs of codes")
    _check_pair("mean", current.mean, reference.mean)
    difference = current.mean - reference.mean  # [n, p, K, C]
    if kind == "eps":
        if current.log_std is not None or reference.log_std is not None:
            raise ValueError("the KL estimator 'eps' compares predicted noises; these are means of reverse steps")
        return difference.square().sum(-1).mean()
    if current.log_std is None or reference.log_std is None:
        raise ValueError("the KL estimator 'exact' needs log_std: outputs of the trajectory estimator")
    _check_pair("log_std", current.log_std, reference.log_std)
    spread = current.log_std - reference.log_std  # [n, p, K, C]
    shift = difference * torch.exp(-reference.log_std)  # [n, p, K, C], in the reference's standard deviations
    divergence = 0.5 * (torch.expm1(2 * spread) + shift.square()) - spread  # [n, p, K, C]
    return divergence.sum(-1).mean()


def _code_divergence(current: Tensor, reference: Tensor) -> Tensor:
    """KL(pi || pi_ref) of log-probabilities [n, p, C, codes], a mean over n, p and C. The terms pi_ref - pi, which add
    up to 0, make each part at least 0, and value and gradient exactly 0 where both agree."""
    _check_pair("code_log_probs", current, reference)
    probs = current.exp()  # [n, p, C, codes]
    parts = probs * (current - reference) - probs + reference.exp()  # [n, p, C, codes]
    return parts.sum(-1).mean()


def _ratio_stats(log_ratio: Tensor, advantage: Tensor, clip_range: float, dual_clip: float) -> dict[str, Tensor]:
    """log_ratio: [n, ...] without gradient. advantage: [n, 1, ...]."""
    ratio = log_ratio.exp()  # [n, ...]
    is_high = ((advantage > 0) & (ratio > 1 + clip_range)) | ((advantage < 0) & (ratio > dual_clip))  # [n, ...]
    is_low = (advantage < 0) & (ratio < 1 - clip_range)  # [n, ...]
    return {
        "ratio_mean": ratio.mean(),
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "log_ratio_std": log_ratio.std(correction=0),
        "clip_high": is_high.float().mean(),
        "clip_low": is_low.float().mean(),
        "approx_kl": (torch.expm1(log_ratio) - log_ratio).mean(),
    }


def _is_flat(rewards: Tensor) -> Tensor:
    """[B, G] -> [B] bool: all rewards of the prompt are equal."""
    return rewards.amax(1) == rewards.amin(1)


def _check_rewards(rewards: Tensor) -> None:
    if rewards.dim() != 2 or 0 in rewards.shape:
        raise ValueError(f"rewards must be [B, G], one row per prompt, got {list(rewards.shape)}")
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError(f"rewards must be finite, got {rewards.tolist()}")


def _check_surrogate(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float, dual_clip: float | None
) -> None:
    _check_pair("log_prob", log_prob, old_log_prob)
    if advantages.dim() not in (1, 2) or advantages.shape != log_prob.shape[: advantages.dim()]:
        shapes = f"advantages {list(advantages.shape)}, log_prob {list(log_prob.shape)}"
        raise ValueError(f"advantages must be [n] or [n, p], as log_prob [n, p, ...] begins, got {shapes}")
    if not clip_range > 0:
        raise ValueError(f"clip_range must be above 0, got {clip_range}")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be above 1, or None, got {dual_clip}")


def _check_pair(name: str, current: Tensor, fixed: Tensor) -> None:
    if current.shape != fixed.shape or current.numel() == 0:
        raise ValueError(
            f"{name} must have one shape, and entries, in both: current {list(current.shape)}, "
            f"old or reference {list(fixed.shape)}"
        )
    if fixed.requires_grad:
        raise ValueError(f"the old or reference {name} has a gradient: compute it under torch.no_grad()")
