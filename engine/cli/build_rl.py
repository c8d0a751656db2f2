"""What stage 3 hands in: prompts with boxes, the reward, rollouts, the policy's update, the held-out evaluation.

The policy and the reference start as the same weights: the averaged ones of the checkpoint that --resume names. Where a
run continues, the reference is the one that was written into its checkpoint.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from engine.checkpoint.best import BestKeeper
from engine.checkpoint.kept import where_to_go_back
from engine.checkpoint.resume import Source, is_backbone
from engine.cli.arguments_rl import RL_TRAIN_MODES
from engine.cli.build import (
    Frozen,
    Parts,
    PreparedRun,
    Stage,
    build_best_keeper,
    build_dataset,
    build_online_evaluation,
    build_pipeline,
    build_train_state,
    coco_inputs,
    data_config,
    place_model,
    prepare_run,
    read_parts,
)
from engine.cli.sampling import sampling_config
from engine.cli.sizes import rl_estimator
from engine.data.coco import CocoLayoutDataset
from engine.eval.judge import Judge, unknown_categories
from engine.rl.cost import estimate_cost
from engine.rl.guard import OverOptimisationGuard
from engine.rl.held_out import HeldOutEvaluation, RolloutPreview
from engine.rl.rewards import LayoutReward, Quality, clip_quality
from engine.rl.rollout import RolloutWorker
from engine.rl.settings import RewardSettings, RewardWeights
from engine.rl.step import GrpoConfig, GrpoStep
from engine.sample.pipeline import StructMARPipeline
from engine.train.loop import TrainConfig, course_of
from engine.train.parallel import gathered
from engine.train.state import TrainState
from models.build import build_model
from models.frozen.clip_score import load_clip
from models.frozen.detections import DetectorSettings
from models.frozen.faster_rcnn import load_detector
from models.policy.base import Estimator, Policy
from models.policy.elbo import ElboEstimator
from models.policy.exact import ExactEstimator
from models.policy.trajectory import TrajectoryEstimator
from models.sampling.config import SamplingConfig
from models.structmar import StructMAR, StructMARConfig
from models.weights import load_structmar_weights
from util.coco import CocoIndex
from util.distributed import DistInfo
from util.ema import Ema
from util.rng import generator
from util.types import Category

logger = logging.getLogger(__name__)

CLIP_RANGES = {"elbo": 0.05, "trajectory": 0.2, "exact": 0.2}


def build_rl(args: argparse.Namespace, dist: DistInfo) -> PreparedRun:
    """Everything main_rl.py trains with. Raises ValueError or FileNotFoundError, naming what does not fit."""
    estimator = build_estimator(args, sampling_config(args))
    free_flags = ("max_rl_steps", "num_preview", "reward_batch_size")
    stage = Stage("grpo", build_prompts, has_pictures=True, keeps_sampling=True, free_flags=free_flags)
    parts = read_parts(args, dist, stage)
    reward = build_reward(args, parts.identity.categories, dist.device)
    require_other_judge(args, parts, reward)
    require_fitting_start(parts.source, reward)
    reference = build_reference(args, parts)
    state = build_train_state(args, parts, RL_TRAIN_MODES[args.rl_train], lambda model: as_policy(model, estimator))
    pipeline = build_pipeline(parts, state)
    worker = RolloutWorker(
        pipeline, reward, parts.sampling, args.group_size, estimator.needs_trace, args.precision, args.seed
    )
    train_config = rl_train_config(args)
    updates = num_updates(parts, train_config)
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
        extra=extra_content(reward, reference, held_out, state, keeper),
        notes=describe_cost(args, parts, estimator, updates),
    )


def num_updates(parts: Parts, config: TrainConfig) -> int:
    """Of the whole run: those that are done and those that are left."""
    start, course = parts.start(config), course_of(config, len(parts.dataset), parts.sampler.global_batch)
    return start.step + course.steps_left(start)


def build_held_out(
    args: argparse.Namespace, parts: Parts, pipeline: StructMARPipeline, ema: Ema, keeper: BestKeeper
) -> HeldOutEvaluation | None:
    """As it was when the run stopped, if it continues. None without a detector that judges."""
    online = build_online_evaluation(args, parts, pipeline, ema, keeper)
    if online is None:
        logger.warning("no --eval_detector: nothing here will notice a reward that is being fooled")
        return None
    way_back = partial(where_to_go_back, Path(args.output_dir))
    guard = OverOptimisationGuard(args.guard, args.guard_drop, args.guard_patience, way_back)
    held_out = HeldOutEvaluation(online, guard)
    if parts.source.kind == "continue":
        held_out.restore(parts.source.state["held_out"])
    return held_out


def extra_content(
    reward: LayoutReward,
    reference: StructMAR | None,
    held_out: HeldOutEvaluation | None,
    state: TrainState,
    keeper: BestKeeper,
) -> Callable[[], dict[str, Any]]:
    """What a checkpoint of this stage holds besides. The reference is stored as far as the policy can leave it."""
    start = {} if reference is None else dict(reference.named_parameters())
    kept = {name: parameter.detach() for name, parameter in start.items() if name in state.trainable}

    def extra() -> dict[str, Any]:
        heard = None if held_out is None else held_out.state()
        own = {"reward_detector": reward.detector_id, "reference": gathered(kept), "held_out": heard}
        return own | keeper.content()

    return extra


def rl_train_config(args: argparse.Namespace) -> TrainConfig:
    return TrainConfig(
        seed=args.seed,
        epochs=args.epochs,
        max_steps=args.max_rl_steps,
        accum_iter=args.accum_iter,
        precision=args.precision,
        log_freq=args.log_freq,
        save_epochs=args.save_last_freq,
        save_steps=args.save_freq_steps,
        keep_steps=args.keep_every,
        preview_steps=args.sample_freq,
        eval_steps=args.eval_freq if args.online_eval else 0,
        signal_steps=1,  # an update takes long
    )


def grpo_config(args: argparse.Namespace, total_updates: int) -> GrpoConfig:
    clip_range = CLIP_RANGES[rl_estimator(args)] if args.clip_range is None else args.clip_range
    return GrpoConfig(
        seed=args.seed,
        total_updates=total_updates,
        inner_epochs=args.inner_epochs,
        clip_range=clip_range,
        kl_coef=args.kl_coef,
        kl_estimator=args.kl_estimator,
        adv_norm=args.adv_norm,
        rl_step_ratio=args.rl_step_ratio,
        mix=args.rl_mix,
        grad_clip=args.grad_clip,
        precision=args.precision,
        mask_ratio_min=args.mask_ratio_min,
        mask_schedule=args.mask_schedule,
    )


def build_estimator(args: argparse.Namespace, sampling: SamplingConfig) -> Estimator:
    if rl_estimator(args) == "exact":
        has_distribution = args.kl_coef > 0 and args.kl_estimator == "exact"
        return ExactEstimator(sampling, args.rl_masks or sampling.num_iter, has_distribution)
    is_guided = sampling.cfg_text != 1 or sampling.cfg_layout != 1
    if rl_estimator(args) == "trajectory":
        num_masks = min(16, sampling.num_iter) if args.rl_masks is None else args.rl_masks
        return TrajectoryEstimator(sampling, num_masks, args.rl_draws)
    if is_guided:
        logger.warning("--rl_estimator elbo scores without guidance what is sampled with it (--cfg): off-policy")
    num_masks = min(4, sampling.num_iter) if args.rl_masks is None else args.rl_masks
    num_draws = 8 if args.rl_draws is None else args.rl_draws
    return ElboEstimator(sampling.num_iter, num_masks, num_draws, schedule=sampling.schedule)


def build_prompts(args: argparse.Namespace, sizes: StructMARConfig, frozen: Frozen) -> CocoLayoutDataset:
    """Images with at least one box: all, or --num_train_samples drawn by the seed. Pixels for the SFT part only."""
    data = replace(data_config(args, sizes.img_size, sizes.max_objects), drop_empty=True)
    index = data.load_index()
    if args.num_train_samples is not None:
        index = drawn_images(index, args.num_train_samples, args.seed)
    return build_dataset(args, data, index, frozen, has_images=args.rl_step_ratio < 1)


def drawn_images(index: CocoIndex, num_images: int, seed: int) -> CocoIndex:
    """So many images of the split, the same for the same seed. Raises ValueError if there are not so many."""
    if num_images > len(index):
        raise ValueError(f"--num_train_samples {num_images} is more than the {len(index)} images with boxes")
    chosen = torch.randperm(len(index), generator=generator(seed, "train samples"))[:num_images].sort().values
    return replace(index, images=tuple(index.images[position] for position in chosen.tolist()))


def build_reward(args: argparse.Namespace, categories: tuple[Category, ...], device: torch.device) -> LayoutReward:
    weights = RewardWeights(args.w_iou, args.w_confidence, args.w_centroid, args.w_miss, args.w_extra, args.w_quality)
    settings = RewardSettings(args.reward_min_score, args.reward_full_score, args.reward_iou_floor)
    detector = load_detector(args.detector_path, device, DetectorSettings(min_score=settings.min_score))
    unknown = unknown_categories(detector, categories)
    if unknown:
        raise ValueError(
            f"--detector_path {args.detector_path} ({detector.arch}) does not know {', '.join(unknown)} "
            f"of the dataset's {len(categories)} categories: it cannot reward them"
        )
    quality: Quality | None = None
    if args.quality_clip_path:
        quality = clip_quality(load_clip(args.quality_clip_path, device))
    logger.info("reward: detector %s, sha256 %s", args.detector_path, detector.id[:12])
    judge = Judge.of(detector, categories)
    return LayoutReward(judge, categories, weights, settings, args.reward_batch_size, quality)


def require_other_judge(args: argparse.Namespace, parts: Parts, reward: LayoutReward) -> None:
    """Raises ValueError if the detector that rewards is to judge too."""
    if parts.scored is not None and parts.scored[1].detector.id == reward.detector_id:
        raise ValueError(
            f"--eval_detector {args.eval_detector} is the detector that rewards (--detector_path): a held-out score "
            "needs another one; --no-online_eval does without"
        )


def require_fitting_start(source: Source, reward: LayoutReward) -> None:
    """Stage 3 starts from a model that knows captions and boxes; a continued run keeps its detector."""
    if source.kind == "scratch" or is_backbone(source):
        raise ValueError(
            f"--resume {source.path or ''}: stage 3 starts from a stage-2 checkpoint, not from MAR's weights"
        )
    if source.kind == "continue" and source.state["reward_detector"] != reward.detector_id:
        raise ValueError(
            f"{source.path} was rewarded by the detector {source.state['reward_detector'][:12]}, --detector_path is "
            f"{reward.detector_id[:12]}: use the same one, or start over in another --output_dir"
        )


def build_reference(args: argparse.Namespace, parts: Parts) -> StructMAR | None:
    """The frozen start of the stage, which the KL holds on to; None at --kl_coef 0."""
    if args.kl_coef == 0:
        return None
    source = parts.source
    kept: dict[str, Tensor] = source.state.get("reference" if source.kind == "continue" else "model_ema", {})
    if source.kind == "continue" and not kept:
        raise ValueError(
            f"{source.path} has no reference, it was written with --kl_coef 0; this run has {args.kl_coef}"
        )
    reference = build_model(parts.config)
    load_structmar_weights(reference, {**source.state["model"], **kept}, str(source.path))
    place_model(args, reference.requires_grad_(False).eval(), parts.dist)
    open_denoise(reference)
    return reference


def as_policy(model: StructMAR, estimator: Estimator) -> nn.Module:
    open_denoise(model)
    return Policy(model, estimator)


def open_denoise(model: StructMAR) -> None:
    """A sharded model gathers its weights for `forward` alone, unless it is told of other methods."""
    if isinstance(model, FSDPModule):
        for method in ("denoise", "code_logits"):
            register_fsdp_forward_method(model, method)


def describe_cost(args: argparse.Namespace, parts: Parts, estimator: Estimator, updates: int) -> list[str]:
    """What the command implies, before anything is done."""
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
    )
    return cost.describe()
