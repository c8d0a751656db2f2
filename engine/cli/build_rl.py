"""What stage 3 hands in where it samples: rollouts, the policy's update, and what both need.

The policy and the reference start as the same weights: the averaged ones of the checkpoint that --resume names. Where a
run continues, the reference is the one that was written into its checkpoint.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
from torch import nn

from engine.cli.arguments_rl import RL_TRAIN_MODES
from engine.cli.build import (
    Parts,
    PreparedRun,
    build_best_keeper,
    build_pipeline,
    build_train_state,
    coco_inputs,
    prepare_run,
    read_parts,
)
from engine.cli.build_reference import build_reference, open_denoise
from engine.cli.build_rl_parts import (
    build_held_out,
    build_reward,
    extra_content,
    require_fitting_start,
    require_other_judge,
    rl_stage,
    rl_train_config,
    warn_of_few_step_head,
    warn_of_guided_samples,
)
from engine.cli.sampling import sampling_config
from engine.cli.sizes import kl_estimator, rl_estimator
from engine.rl.cost import estimate_cost
from engine.rl.held_out import RolloutPreview
from engine.rl.objectives import BestOf, Clipped, Nft, Objective
from engine.rl.rollout import RolloutWorker
from engine.rl.step import GrpoConfig, GrpoStep
from models.policy.base import Estimator, Policy
from models.policy.elbo import ElboEstimator
from models.policy.exact import ExactEstimator
from models.policy.trajectory import TrajectoryEstimator
from models.sampling.config import SamplingConfig
from models.structmar import StructMAR
from util.distributed import DistInfo

logger = logging.getLogger(__name__)

CLIP_RANGES = {"elbo": 0.05, "trajectory": 0.2, "exact": 0.2}
DEFAULT_NFT_BETA = 1.0
OFF_POLICY = {
    "grpo": "off-policy",
    "nft": "the old prediction is not the denoiser of these samples, which biases the update",
    "best_of": "what comes out draws so without guidance, and is to be sampled without (--cfg 1)",
}


def build_rl(args: argparse.Namespace, dist: DistInfo) -> PreparedRun:
    """Everything main_rl.py trains with. Raises ValueError or FileNotFoundError, naming what does not fit."""
    estimator = build_estimator(args, sampling_config(args))
    parts = read_parts(args, dist, rl_stage(args))
    reward = build_reward(args, parts.identity.categories, dist.device)
    require_other_judge(args, parts, reward.detector_id)
    require_fitting_start(parts.source, reward.detector_id)
    warn_of_guided_samples(parts)
    warn_of_few_step_head(parts)
    reference = build_reference(args, parts, f"--kl_coef {args.kl_coef}") if args.kl_coef > 0 else None
    state = build_train_state(args, parts, RL_TRAIN_MODES[args.rl_train], lambda model: as_policy(model, estimator))
    pipeline = build_pipeline(parts, state)
    worker = RolloutWorker(
        pipeline, reward, parts.sampling, args.group_size, estimator.needs_trace, args.precision, args.seed
    )
    train_config = rl_train_config(args)
    updates = parts.num_steps(train_config)
    make_inputs = coco_inputs(args, parts) if args.rl_step_ratio < 1 else None
    output_dir, keeper = Path(args.output_dir), build_best_keeper(args, parts, state)
    held_out = build_held_out(args, parts, pipeline, state.ema, keeper)
    preview = RolloutPreview(parts.identity.categories, args.num_preview, args.reward_min_score, dist, output_dir)
    observers = [preview.note] if held_out is None else [preview.note, held_out.note]
    config = grpo_config(args, updates)
    step = GrpoStep(config, state, worker, estimator, reference, make_inputs, dist, observers)
    return prepare_run(
        args,
        parts,
        state,
        train_config,
        step,
        preview,
        evaluate=held_out,
        extra=extra_content(reward.detector_id, reference, held_out, state, keeper),
        notes=describe_cost(args, parts, estimator, updates),
    )


def grpo_config(args: argparse.Namespace, total_updates: int) -> GrpoConfig:
    return GrpoConfig(
        seed=args.seed,
        total_updates=total_updates,
        objective=build_objective(args),
        inner_epochs=args.inner_epochs,
        kl_coef=args.kl_coef,
        kl_estimator=kl_estimator(args),
        credit=args.credit,
        adv_norm=args.adv_norm,
        rl_step_ratio=args.rl_step_ratio,
        mix=args.rl_mix,
        grad_clip=args.grad_clip,
        precision=args.precision,
        mask_ratio_min=args.mask_ratio_min,
        mask_schedule=args.mask_schedule,
    )


def build_objective(args: argparse.Namespace) -> Objective:
    if args.objective == "nft":
        return Nft(DEFAULT_NFT_BETA if args.nft_beta is None else args.nft_beta)
    if args.objective == "best_of":
        return BestOf()
    return Clipped(CLIP_RANGES[rl_estimator(args)] if args.clip_range is None else args.clip_range)


def build_estimator(args: argparse.Namespace, sampling: SamplingConfig) -> Estimator:
    if rl_estimator(args) == "exact":
        has_distribution = args.kl_coef > 0 and kl_estimator(args) == "exact"
        return ExactEstimator(sampling, args.rl_masks or sampling.num_iter, has_distribution)
    if rl_estimator(args) == "trajectory":
        num_masks = min(16, sampling.num_iter) if args.rl_masks is None else args.rl_masks
        return TrajectoryEstimator(sampling, num_masks, args.rl_draws)
    if sampling.is_guided:
        meaning = OFF_POLICY[args.objective]
        logger.warning("--rl_estimator elbo scores without guidance what is sampled with it (--cfg): %s", meaning)
    num_masks = min(4, sampling.num_iter) if args.rl_masks is None else args.rl_masks
    num_draws = 8 if args.rl_draws is None else args.rl_draws
    t_range = (args.rl_t_min, args.rl_t_max)
    return ElboEstimator(sampling.num_iter, num_masks, num_draws, schedule=sampling.schedule, t_range=t_range)


def as_policy(model: StructMAR, estimator: Estimator) -> nn.Module:
    open_denoise(model)
    return Policy(model, estimator)


def describe_cost(args: argparse.Namespace, parts: Parts, estimator: Estimator, updates: int) -> list[str]:
    """What the command implies, before anything is done."""
    objective = build_objective(args)
    scored = objective.scored_images(torch.zeros(1, args.group_size))
    cost = estimate_cost(
        parts.config,
        parts.sampling,
        args.batch_size,
        args.group_size,
        rl_estimator(args),
        estimator.num_masks,
        estimator.num_draws,
        args.inner_epochs,
        args.kl_coef > 0,
        parts.frozen.text_encoder.max_tokens,
        updates,
        args.accum_iter,
        objective.needs_old(args.inner_epochs),
        None if scored is None else len(scored),
    )
    return cost.describe()
