"""From parsed arguments to a ready stage 3. What it shares with stages 1 and 2 is in engine/cli/build.py.

The policy and the reference start as the same weights: the averaged ones of the checkpoint that --resume names. Where a
run continues, the reference is the one that was written into its checkpoint.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from engine.checkpoint.identity import Identity
from engine.checkpoint.resume import (
    Source,
    check_identity,
    find_source,
    is_backbone,
    log_changed_args,
    resumed_position,
)
from engine.cli.arguments_rl import RL_TRAIN_MODES
from engine.cli.build import (
    Frozen,
    Prepared,
    build_dataset,
    build_frozen,
    build_learner,
    build_online_targets,
    build_sampler,
    coco_inputs,
    data_config,
    describe_size,
    initial_model,
    lr_schedule,
    model_config,
    place_model,
    require_fitting_vae,
    require_launched,
    saver,
)
from engine.cli.sampling import sampling_config
from engine.data.coco import CocoLayoutDataset
from engine.data.loader import coco_batches
from engine.eval.judge import Judge, unknown_categories
from engine.eval.online import OnlineEvaluation
from engine.eval.targets import EvalSet
from engine.rl.cost import estimate_cost
from engine.rl.guard import OverOptimisationGuard
from engine.rl.held_out import HeldOutEvaluation, RolloutPreview
from engine.rl.rewards import LayoutReward, Quality, RewardSettings, RewardWeights, clip_quality
from engine.rl.rollout import RolloutWorker
from engine.rl.step import GrpoConfig, GrpoStep
from engine.train.loop import Learner, TrainConfig, TrainingRun
from engine.train.parallel import gathered
from models.build import build_model
from models.frozen.detections import DetectorSettings
from models.frozen.faster_rcnn import load_detector
from models.frozen.features import load_clip
from models.masking import cosine_masked_counts
from models.policy import ElboEstimator, Estimator, Policy, TrajectoryEstimator
from models.sampling.sampler import SamplingConfig
from models.structmar import StructMAR, StructMARConfig
from models.weights import load_structmar_weights
from util.coco import CocoIndex
from util.config import resolved_dict
from util.distributed import DistInfo
from util.rng import generator
from util.types import Category

logger = logging.getLogger(__name__)

STAGE = "grpo"
NOT_TRAINING = ("output_dir", "log_dir", "resume", "no_auto_resume", "num_workers", "pin_mem", "log_freq",
                "max_rl_steps", "save_last_freq", "save_freq_steps", "num_threads", "sample_freq", "num_preview",
                "reward_batch_size")  # fmt: skip


def build_rl(args: argparse.Namespace, dist: DistInfo) -> Prepared:
    """Everything main_rl.py trains with. Raises ValueError or FileNotFoundError, naming what does not fit."""
    require_launched(args, "main_rl.py")
    sampling = sampling_config(args)
    sizes = model_config(args, num_categories=0, text_dim=0)  # before anything is read: do the sizes fit together?
    cosine_masked_counts(sizes.num_tokens, sampling.num_iter)  # raises if num_iter does not fit
    estimator = build_estimator(args, sampling)
    frozen = build_frozen(args, dist.device)
    require_fitting_vae(sizes, frozen.codec, args.vae_path)
    dataset = build_prompts(args, sizes, frozen)
    categories = dataset.index.categories
    reward = build_reward(args, categories, dist.device)
    config = model_config(args, len(categories), frozen.text_encoder.dim)
    sampler = build_sampler(args, dataset, dist)
    scored = build_online_targets(args, config, categories, dist.device)
    if scored is not None and scored[1].detector.id == reward.detector_id:
        raise ValueError(
            f"--eval_detector {args.eval_detector} is the detector that rewards (--detector_path): a held-out score "
            "needs another one; --no-online_eval does without"
        )
    source = find_source(args.output_dir, args.resume, not args.no_auto_resume, STAGE)
    check_start(source, reward)
    started_from = source.identity
    kept = None if started_from is None else started_from.sampling  # not the rollouts' options, where the weights say
    identity = Identity(
        config, frozen.codec.id, frozen.codec.latent_scale, frozen.text_encoder.id, categories,
        sampling=kept or sampling,
    )  # fmt: skip
    check_identity(source, identity)

    values = resolved_dict(args)
    log_changed_args(source, values, NOT_TRAINING)
    reference = build_reference(args, config, source, dist)
    model = initial_model(args, config, source, STAGE)
    mode = RL_TRAIN_MODES[args.rl_train]
    learner = build_learner(args, model, mode, source, dist, lambda model: as_policy(model, estimator))
    pins = args.pin_mem and dist.device.type == "cuda"
    batches = coco_batches(dataset, sampler, config.max_objects, args.num_workers, pins)
    steps_per_epoch = len(batches) // args.accum_iter
    total = min(args.epochs * steps_per_epoch, args.max_rl_steps or args.epochs * steps_per_epoch)
    worker = RolloutWorker(
        model, frozen.codec, frozen.text_encoder, reward, sampling, args.group_size, estimator.needs_trace,
        args.precision, args.seed, dist.device,
    )  # fmt: skip
    make_inputs = coco_inputs(args, frozen, dist.device) if args.rl_step_ratio < 1 else None
    step = GrpoStep(grpo_config(args, total), learner, worker, estimator, reference, make_inputs, dist)
    held_out = build_held_out(args, frozen, scored, step, dist)
    if held_out is not None and source.kind == "continue":
        held_out.restore(source.state["held_out"])

    output_dir, global_batch = Path(args.output_dir), args.batch_size * dist.world_size
    extra = extra_content(reward, reference, held_out, learner)
    run = TrainingRun(
        config=train_config(args),
        learner=learner,
        schedule=lr_schedule(args, dist.world_size),
        batches=batches,
        step=step,
        dist=dist,
        save=saver(learner, output_dir, STAGE, identity, values, global_batch, dist, extra),
        preview=RolloutPreview(step, categories, args.num_preview, args.reward_min_score, dist, output_dir),
        evaluate=held_out,
    )
    notes = (describe_size(run, batches, dist), *describe_cost(args, config, sampling, estimator, total, frozen))
    return Prepared(run, resumed_position(source, global_batch, args.accum_iter, steps_per_epoch), STAGE, values, notes)


def build_held_out(
    args: argparse.Namespace, frozen: Frozen, scored: tuple[EvalSet, Judge] | None, step: GrpoStep, dist: DistInfo
) -> HeldOutEvaluation | None:
    if scored is None:
        logger.warning("no --eval_detector: nothing here will notice a reward that is being fooled")
        return None
    online = OnlineEvaluation(
        step.learner, frozen.codec, frozen.text_encoder, *scored, sampling_config(args), args.seed, args.eval_bsz,
        args.precision, dist,
    )  # fmt: skip
    return HeldOutEvaluation(online, OverOptimisationGuard(args.guard, args.guard_drop, args.guard_patience), step)


def extra_content(
    reward: LayoutReward, reference: StructMAR | None, held_out: HeldOutEvaluation | None, learner: Learner
) -> Callable[[], dict[str, Any]]:
    """What a checkpoint of this stage holds besides. The reference is stored as far as the policy can leave it."""
    start = {} if reference is None else dict(reference.named_parameters())
    kept = {name: parameter.detach() for name, parameter in start.items() if name in learner.trainable}

    def extra() -> dict[str, Any]:
        state = None if held_out is None else held_out.state()
        return {"reward_detector": reward.detector_id, "reference": gathered(kept), "held_out": state}

    return extra


def train_config(args: argparse.Namespace) -> TrainConfig:
    return TrainConfig(
        seed=args.seed,
        epochs=args.epochs,
        max_steps=args.max_rl_steps,
        accum_iter=args.accum_iter,
        precision=args.precision,
        log_freq=args.log_freq,
        save_epochs=args.save_last_freq,
        save_steps=args.save_freq_steps,
        preview_steps=args.sample_freq,
        eval_steps=args.eval_freq if args.online_eval else 0,
        signal_steps=1,  # an update takes long
    )


def grpo_config(args: argparse.Namespace, total_updates: int) -> GrpoConfig:
    clip_range = {"elbo": 0.05, "trajectory": 0.2}[args.rl_estimator] if args.clip_range is None else args.clip_range
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
    )


def build_estimator(args: argparse.Namespace, sampling: SamplingConfig) -> Estimator:
    is_guided = sampling.cfg_text != 1 or sampling.cfg_layout != 1
    if args.rl_estimator == "trajectory":
        num_masks = min(16, sampling.num_iter) if args.rl_masks is None else args.rl_masks
        return TrajectoryEstimator(sampling, num_masks, args.rl_draws)
    if is_guided:
        logger.warning("--rl_estimator elbo scores without guidance what is sampled with it (--cfg): off-policy")
    num_masks = min(4, sampling.num_iter) if args.rl_masks is None else args.rl_masks
    return ElboEstimator(sampling.num_iter, num_masks, 8 if args.rl_draws is None else args.rl_draws)


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


def check_start(source: Source, reward: LayoutReward) -> None:
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


def build_reference(
    args: argparse.Namespace, config: StructMARConfig, source: Source, dist: DistInfo
) -> StructMAR | None:
    """The frozen start of the stage, which the KL holds on to; None at --kl_coef 0."""
    if args.kl_coef == 0:
        return None
    kept: dict[str, Tensor] = source.state["reference" if source.kind == "continue" else "model_ema"]
    if source.kind == "continue" and not kept:
        raise ValueError(
            f"{source.path} has no reference, it was written with --kl_coef 0; this run has {args.kl_coef}"
        )
    reference = build_model(config)
    load_structmar_weights(reference, {**source.state["model"], **kept}, str(source.path))
    place_model(args, reference.requires_grad_(False).eval(), dist)
    open_denoise(reference)
    return reference


def as_policy(model: StructMAR, estimator: Estimator) -> nn.Module:
    open_denoise(model)
    return Policy(model, estimator)


def open_denoise(model: StructMAR) -> None:
    """A sharded model gathers its weights for `forward` alone, unless it is told of other methods."""
    if isinstance(model, FSDPModule):
        register_fsdp_forward_method(model, "denoise")


def describe_cost(
    args: argparse.Namespace,
    config: StructMARConfig,
    sampling: SamplingConfig,
    estimator: Estimator,
    updates: int,
    frozen: Frozen,
) -> list[str]:
    """What the command implies, before anything is done."""
    cost = estimate_cost(
        config,
        sampling,
        args.batch_size,
        args.group_size,
        args.rl_estimator,
        estimator.num_masks,
        estimator.num_draws,
        args.inner_epochs,
        args.kl_coef > 0,
        frozen.text_encoder.max_tokens,
        updates,
        args.accum_iter,
    )
    return cost.describe()
