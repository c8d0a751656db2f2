"""The command-line flags of stage 3. Model, data, optimizer, run and sampling share theirs with stages 1 and 2; where a
default differs from theirs, it is set here."""

from __future__ import annotations

import argparse

from engine.cli.arguments import (
    DEFAULT_DETECTOR,
    SWITCH,
    add_config_arg,
    add_data_args,
    add_frozen_args,
    add_length_args,
    add_optim_args,
    add_run_args,
    add_sft_args,
)
from engine.cli.arguments_model import add_model_args
from engine.cli.arguments_sampling import add_sampling_args, steps_int
from engine.cli.arguments_scores import add_score_args
from engine.rl.settings import (
    ADV_NORMS,
    CREDITS,
    ESTIMATORS,
    GRADIENT_STATES,
    GUARD_MODES,
    KL_ESTIMATORS,
    MIXES,
    OBJECTIVES,
    RewardSettings,
    RewardWeights,
)
from util.config import Parser
from util.ranges import (
    Range,
    batch_int,
    fraction,
    fraction_below_one,
    nonnegative_float,
    nonnegative_int,
    positive_float,
    positive_fraction,
    positive_int,
    whole,
)

timestep_int = whole(0, 999)
RL_TRAIN_MODES = {"all": "full", "backbone": "backbone", "adapters": "text_layout"}  # --rl_train -> train_mode
DEFAULTS = {
    "output_dir": "./output/stage3_rl_grpo",
    "batch_size": 4,
    "epochs": 10,
    "num_iter": 256,
    "lr": 1e-6,
    "weight_decay": 0.0,
    "warmup_epochs": 0.0,
    "grad_clip": 1.0,
    "ema_rate": 0.995,
    "log_freq": 1,
    "save_last_freq": 1,
    "save_freq_steps": 50,
}


def rl_parser() -> argparse.ArgumentParser:
    """The parser of main_rl.py."""
    parser = Parser(
        prog="main_rl.py",
        description="StructMAR stage 3: a frozen detector as reward, on captions and boxes of COCO, by GRPO or by the "
        "gradient of its loss.",
    )
    add_config_arg(parser)
    add_model_args(parser)
    add_frozen_args(parser)
    add_data_args(parser)
    add_rl_args(parser)
    add_reward_args(parser)
    add_reward_gradient_args(parser)
    add_sft_args(parser.add_argument_group("the SFT part (where --rl_step_ratio is below 1)"))
    add_optim_args(parser)
    add_run_args(parser)
    add_sampling_args(parser)
    add_rl_preview_args(parser)
    parser.set_defaults(**DEFAULTS)
    return parser


def add_rl_args(parser: argparse.ArgumentParser) -> None:
    """Rollouts and updates."""
    group = parser.add_argument_group("updates")
    add_length_args(group)
    group.add_argument(
        "--objective",
        default="grpo",
        choices=OBJECTIVES,
        help="GRPO's clipped ratio; denoising errors weighted by advantages; likelihood of each group's best image; "
        "or, without rollouts, the gradient of the detector's loss through predicted pictures",
    )
    group.add_argument(
        "--credit",
        default="image",
        choices=CREDITS,
        help="an image's advantage for all of its tokens, or each box's own for the tokens inside it",
    )
    group.add_argument(
        "--nft_beta",
        type=positive_float,
        default=None,
        help="--objective nft: how strongly a prediction is held near the one before the update; None: 1",
    )
    group.add_argument(
        "--max_rl_steps", type=positive_int, default=None, help="stop after this many updates of this stage"
    )
    group.add_argument(
        "--num_train_samples",
        type=positive_int,
        default=None,
        help="prompts of an epoch: so many images, drawn once by the seed; None: all with boxes",
    )
    group.add_argument(
        "--group_size",
        type=Range(int, "must be at least 2: advantages compare images of one prompt", 2, 1024),
        default=4,
        help="images sampled per prompt; --batch_size counts prompts",
    )
    group.add_argument(
        "--rl_estimator",
        default=None,
        choices=ESTIMATORS,
        help="log-probabilities from denoising losses of the final tokens, of the recorded reverse steps, or (discrete "
        "head) exact ones of codes; None: elbo, or exact",
    )
    group.add_argument(
        "--rl_masks",
        type=whole(1, 65536),
        default=None,
        help="sampling iterations scored per image; None: 4 (elbo), 16 (trajectory), all (exact)",
    )
    group.add_argument(
        "--rl_draws",
        type=steps_int,
        default=None,
        help="noise draws per token (elbo; None: 8) or reverse steps scored (trajectory; None: all but 2 at each end)",
    )
    group.add_argument(
        "--rl_t_min", type=whole(0, 999), default=0, help="elbo: noise levels are drawn from this timestep up, of 1000"
    )
    group.add_argument("--rl_t_max", type=whole(1, 1000), default=1000, help="elbo: and below this one")
    group.add_argument(
        "--inner_epochs", type=whole(1, 1000), default=2, help="optimizer steps on each update's rollouts"
    )
    group.add_argument(
        "--clip_range", type=positive_float, default=None, help="of the ratio; None: 0.05 (elbo), 0.2 (the others)"
    )
    group.add_argument(
        "--kl_coef", type=nonnegative_float, default=0.02, help="weight of the KL to the start; 0: no reference model"
    )
    group.add_argument(
        "--kl_estimator",
        default=None,
        choices=KL_ESTIMATORS,
        help="k2, k3: from log-probabilities; eps: elbo only; exact: trajectory, and exact over all codes; None: eps "
        "for nft, k3 for the others",
    )
    group.add_argument(
        "--adv_norm", default="zscore", choices=ADV_NORMS, help="how a group's rewards become advantages"
    )
    group.add_argument(
        "--rl_step_ratio",
        type=fraction,
        default=1.0,
        help="r of r * RL + (1 - r) * SFT; 1: pure RL, no image is read; 0: nothing is sampled",
    )
    group.add_argument(
        "--rl_mix", default="loss", choices=MIXES, help="mix both losses in every step, or draw the kind of each step"
    )
    group.add_argument(
        "--rl_train",
        default="all",
        choices=sorted(RL_TRAIN_MODES),
        help="everything; without the head; or stage 1's new parts",
    )


def add_reward_args(parser: argparse.ArgumentParser) -> None:
    """The detector's verdict as a number."""
    weights, settings = RewardWeights(), RewardSettings()
    group = parser.add_argument_group("reward")
    group.add_argument("--detector_path", default=DEFAULT_DETECTOR, help="the frozen detector that rewards")
    group.add_argument(
        "--w_iou", type=nonnegative_float, default=weights.iou, help="weight of the IoU with the wanted boxes"
    )
    group.add_argument(
        "--w_confidence", type=nonnegative_float, default=weights.confidence, help="weight of the detector's scores"
    )
    group.add_argument(
        "--w_centroid", type=nonnegative_float, default=weights.centroid, help="weight of the nearness of centres"
    )
    group.add_argument(
        "--w_miss", type=nonnegative_float, default=weights.miss, help="weight of missing objects, subtracted"
    )
    group.add_argument(
        "--w_extra", type=nonnegative_float, default=weights.extra, help="weight of unwanted objects, subtracted"
    )
    group.add_argument("--w_quality", type=nonnegative_float, default=weights.quality, help="weight of the CLIP score")
    group.add_argument("--quality_clip_path", default="", help="a whole CLIP for --w_quality; empty: no such term")
    group.add_argument(
        "--reward_min_score", type=fraction, default=settings.min_score, help="weaker detections are ignored"
    )
    group.add_argument(
        "--reward_full_score",
        type=positive_fraction,
        default=settings.full_credit_score,
        help="detections below it count in proportion to their score",
    )
    group.add_argument(
        "--reward_iou_floor",
        type=fraction_below_one,
        default=settings.iou_floor,
        help="a detection that overlaps less with a wanted box is not that object",
    )
    group.add_argument("--reward_batch_size", type=batch_int, default=16, help="images the detector sees at a time")


def add_reward_gradient_args(parser: argparse.ArgumentParser) -> None:
    """What --objective reward_gradient has for itself."""
    group = parser.add_argument_group("reward gradient (--objective reward_gradient)")
    group.add_argument(
        "--more_detectors", nargs="+", default=None, metavar="FILE",
        help="detectors (Faster R-CNN .pth) beside --detector_path: an ensemble is harder to fool",
    )  # fmt: skip
    group.add_argument(
        "--detector_weights", type=positive_float, nargs="+", default=None, metavar="WEIGHT",
        help="of the losses of --detector_path and --more_detectors, in this order; None: 1 each",
    )  # fmt: skip
    group.add_argument(
        "--w_colour",
        type=nonnegative_float,
        default=0.0,
        help="weight of the distance of boxes' mean colours from those of the real picture",
    )
    group.add_argument(
        "--w_pixels",
        type=nonnegative_float,
        default=0.0,
        help="weight of the mean absolute distance of all pixels from those of the real picture",
    )
    group.add_argument(
        "--anchor",
        type=nonnegative_float,
        default=0.3,
        help="weight of the predicted noise's distance to the start, at all noise levels; 0: no reference model",
    )
    group.add_argument(
        "--reward_t_min",
        type=timestep_int,
        default=200,
        help="lowest noise level that is predicted from for the reward",
    )
    group.add_argument("--reward_t_max", type=timestep_int, default=850, help="highest such level")
    group.add_argument(
        "--gradient_states",
        default="real",
        choices=GRADIENT_STATES,
        help="what is predicted from: training images with hidden tokens, or own rollouts (--num_iter and the like)",
    )
    group.add_argument(
        "--gradient_steps",
        type=whole(1, 50),
        default=1,
        help="steps of the head from a noise level to clean tokens, all with gradients",
    )
    group.add_argument(
        "--augment_shift",
        type=fraction,
        default=0.0,
        help="width of a frame that the picture is set into before the detector, as a share of its sides",
    )
    group.add_argument(
        "--augment_blur", type=Range(float, "must lie in [0, 20]", 0, 20), default=0.0, help="largest blur, in pixels"
    )
    group.add_argument("--augment_noise", type=fraction, default=0.0, help="largest noise, of pixels in [0, 1]")
    group.add_argument(
        "--augment_resize", type=fraction_below_one, default=0.0, help="largest change of size, as a share"
    )


def add_rl_preview_args(parser: argparse.ArgumentParser) -> None:
    """Rollout pictures, and the held-out evaluation with its guard."""
    group = parser.add_argument_group("pictures and held-out scores while training")
    group.add_argument(
        "--sample_freq", type=nonnegative_int, default=20, help="updates between pictures of rollouts; 0: none"
    )
    group.add_argument(
        "--num_preview", type=batch_int, default=4, help="prompts in such a picture, with all their images"
    )
    group.add_argument(
        "--online_eval",
        action=SWITCH,
        default=True,
        help="score a fixed set of layouts every --eval_freq updates, where --eval_detector is given",
    )
    group.add_argument("--eval_freq", type=positive_int, default=100, help="updates between held-out evaluations")
    add_score_args(group)
    group.add_argument(
        "--guard",
        default="warn",
        choices=GUARD_MODES,
        help="what to do when the reward rises while the held-out AP50 falls",
    )
    group.add_argument(
        "--guard_drop", type=fraction, default=0.02, help="fall of the held-out AP50 that counts, as a share"
    )
    group.add_argument("--guard_patience", type=positive_int, default=2, help="evaluations in a row below it")
