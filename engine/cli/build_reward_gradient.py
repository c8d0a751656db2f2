"""What stage 3 hands in where it learns from the gradient of a reward: states, the pictures' loss, the anchor.

Policy and anchor start as the averaged weights of the checkpoint that --resume names; where a run continues, the anchor
is the one in its checkpoint.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

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
from engine.data.inputs import DropRates
from engine.rl.augment import Augmentation
from engine.rl.cost_gradient import reward_gradient_cost
from engine.rl.gradient_states import NoiseLevels, RealStates, RolloutStates, StateSource
from engine.rl.picture_loss import PictureLoss
from engine.rl.prediction_preview import PredictionPreview
from engine.rl.reward_gradient import PredictionObserver, RewardGradientConfig, RewardGradientStep
from engine.rl.rewards import LayoutReward
from engine.sample.pipeline import StructMARPipeline
from models.flops import PassFlops
from models.frozen.detections import BoxDetector
from models.frozen.detector_loss import DetectorLoss
from models.frozen.faster_rcnn import Detector, load_detector
from models.frozen.flops import decoder_flops, detector_flops
from models.frozen.vae import LatentCodec
from models.policy.clean import CleanPolicy
from models.structmar import StructMAR
from util.distributed import DistInfo

logger = logging.getLogger(__name__)


def build_reward_gradient(args: argparse.Namespace, dist: DistInfo) -> PreparedRun:
    """Everything main_rl.py trains with. Raises ValueError or FileNotFoundError, naming what does not fit."""
    parts = read_parts(args, dist, rl_stage(args))
    reward = build_reward(args, parts.identity.categories, dist.device)
    loss = build_picture_loss(args, parts, reward)
    for detector, _ in loss.detectors:
        require_other_judge(args, parts, detector.id)
    require_fitting_start(parts.source, loss.detector_id)
    warn_of_guided_samples(parts)
    warn_of_few_step_head(parts)
    warn_of_guidance(parts)
    reference = build_reference(args, parts, f"--anchor {args.anchor:g}") if args.anchor > 0 else None
    state = build_train_state(
        args, parts, RL_TRAIN_MODES[args.rl_train], lambda model: as_clean_policy(args, parts, model)
    )
    pipeline = build_pipeline(parts, state)
    train_config = rl_train_config(args)
    output_dir, keeper = Path(args.output_dir), build_best_keeper(args, parts, state)
    held_out = build_held_out(args, parts, pipeline, state.ema, keeper)
    preview = PredictionPreview(
        reward, parts.identity.categories, args.num_preview, args.reward_min_score, dist, output_dir
    )
    observers: list[PredictionObserver] = [preview.note]
    if held_out is not None:
        observers.append(lambda _, mean_reward: held_out.note([], mean_reward))
    updates = parts.num_steps(train_config)
    config = RewardGradientConfig(args.seed, updates, args.anchor, args.grad_clip, args.precision)
    # Without dropped conditions: a picture is held against boxes that the model was told of.
    make_inputs = replace(coco_inputs(args, parts), rates=DropRates(0.0, 0.0, 0.0))
    states = build_states(args, parts, pipeline)
    step = RewardGradientStep(config, state, states, codec_of(parts), loss, reference, make_inputs, dist, observers)
    return prepare_run(
        args,
        parts,
        state,
        train_config,
        step,
        preview,
        evaluate=held_out,
        extra=extra_content(loss.detector_id, reference, held_out, state, keeper),
        notes=describe_cost(args, parts, loss, updates),
    )


def codec_of(parts: Parts) -> LatentCodec:
    codec = parts.frozen.codec
    assert isinstance(codec, LatentCodec), "a diffusion head has continuous latents"
    return codec


def as_clean_policy(args: argparse.Namespace, parts: Parts, model: StructMAR) -> nn.Module:
    open_denoise(model)
    return CleanPolicy(model, args.gradient_steps, parts.sampling.clip_x0, has_second=args.anchor > 0)


def build_states(args: argparse.Namespace, parts: Parts, pipeline: StructMARPipeline) -> StateSource:
    levels = NoiseLevels(args.reward_t_min, args.reward_t_max)
    if args.gradient_states == "rollout":
        return RolloutStates(levels, args.seed, pipeline, parts.sampling, args.precision)
    return RealStates(levels, args.seed, args.mask_schedule, args.mask_ratio_min)


def build_picture_loss(args: argparse.Namespace, parts: Parts, reward: LayoutReward) -> PictureLoss:
    """Of --detector_path, which `reward` has read, and --more_detectors."""
    device, categories = parts.dist.device, parts.identity.categories
    found: list[tuple[str, BoxDetector]] = [(f"--detector_path {args.detector_path}", reward.judge.detector)]
    for path in args.more_detectors or ():
        found.append((f"--more_detectors {path}", load_detector(path, device)))
    ids: dict[str, str] = {}
    losses = []
    for said, detector in found:
        if not isinstance(detector, Detector):
            raise ValueError(f"{said}: an export ({detector.arch}) has no gradients, take a Faster R-CNN (.pth)")
        if detector.id in ids:
            raise ValueError(f"{said} is the same detector as {ids[detector.id]}")
        ids[detector.id] = said
        try:
            losses.append(DetectorLoss(detector, categories))
        except ValueError as error:
            raise ValueError(f"{said}: {error}") from error
    weights: Sequence[float] = args.detector_weights or [1.0] * len(losses)
    changes = Augmentation(args.augment_shift, args.augment_blur, args.augment_noise, args.augment_resize)
    return PictureLoss([*zip(losses, weights, strict=True)], args.w_colour, args.w_pixels, changes, args.seed)


def warn_of_guidance(parts: Parts) -> None:
    """Says so where this run samples with guidance."""
    sampling = parts.sampling
    if sampling.is_guided:
        logger.warning(
            "--objective reward_gradient teaches the prediction without guidance; scores and rollouts of this run have "
            "--cfg_text %g and --cfg_layout %g: train these into the weights first (--train_mode distill), or take 1",
            sampling.cfg_text, sampling.cfg_layout,
        )  # fmt: skip


def describe_cost(args: argparse.Namespace, parts: Parts, loss: PictureLoss, updates: int) -> list[str]:
    """What the command implies, before anything is done."""
    codec, side = codec_of(parts), parts.config.img_size
    decoder = decoder_flops(codec, (side // codec.stride, side // codec.stride))
    if loss.needs_real:
        decoder = PassFlops(2 * decoder.forward, decoder.backward)
    cost = reward_gradient_cost(
        parts.config,
        args.batch_size,
        args.anchor > 0,
        decoder,
        [detector_flops(detector.model) for detector, _ in loss.detectors],
        args.mask_schedule,
        args.mask_ratio_min,
        parts.frozen.text_encoder.max_tokens,
        updates,
        args.accum_iter,
        rollout=parts.sampling if args.gradient_states == "rollout" else None,
        num_steps=args.gradient_steps,
    )
    return cost.describe()
