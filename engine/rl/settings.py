"""What a command line names of stage 3: choices, and the reward's numbers. Nothing slow is imported here."""

from __future__ import annotations

from dataclasses import asdict, dataclass

OBJECTIVES = ("grpo", "nft", "best_of", "reward_gradient")
CREDITS = ("image", "region")
GRADIENT_STATES = ("real", "rollout")
FLAGS_OF_SAMPLES = ("group_size", "credit", "nft_beta", "rl_estimator", "rl_masks", "rl_draws", "rl_t_min",
                    "rl_t_max", "inner_epochs", "clip_range", "kl_coef", "kl_estimator", "adv_norm",
                    "rl_step_ratio", "rl_mix")  # fmt: skip
FLAGS_OF_GRADIENT = ("more_detectors", "detector_weights", "w_colour", "w_pixels", "anchor", "reward_t_min",
                     "reward_t_max", "gradient_states", "gradient_steps", "augment_shift", "augment_blur",
                     "augment_noise", "augment_resize")  # fmt: skip
ESTIMATOR_HEADS = {"elbo": "diffusion", "trajectory": "diffusion", "exact": "discrete"}  # whose tokens each scores
ESTIMATORS = tuple(ESTIMATOR_HEADS)
DEFAULT_ESTIMATORS = {"diffusion": "elbo", "discrete": "exact"}  # by head
ADV_NORMS = ("zscore", "center", "batch", "none")
KL_ESTIMATORS = ("k2", "k3", "eps", "exact")
MIXES = ("loss", "step")
GUARD_MODES = ("off", "warn", "stop")


@dataclass(frozen=True)
class RewardWeights:
    """How much each part counts, at least 0; miss and extra are subtracted. Raises ValueError if all are 0."""

    iou: float = 1.0
    confidence: float = 0.2
    centroid: float = 0.2
    miss: float = 0.1
    extra: float = 0.05
    quality: float = 0.0

    def __post_init__(self) -> None:
        if not any(asdict(self).values()):
            raise ValueError("all reward weights are 0: every image would get the same reward")


@dataclass(frozen=True)
class RewardSettings:
    """What counts as a detection, and as its object; see engine/rl/rewards.py.

    min_score in [0, 1]; full_credit_score in (0, 1]; iou_floor in [0, 1).
    """

    min_score: float = 0.05
    full_credit_score: float = 0.5
    iou_floor: float = 0.1
