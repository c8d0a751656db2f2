"""What every objective of stage 3 is built from: prompts with boxes, the reward, the run's length, the held-out
evaluation, and what its checkpoints hold besides."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.best import BestKeeper
from engine.checkpoint.kept import where_to_go_back
from engine.checkpoint.resume import Source, is_backbone
from engine.cli.build import Frozen, Parts, Stage, build_dataset, build_online_evaluation, data_config
from engine.cli.build_reference import reference_content
from engine.data.coco import CocoLayoutDataset
from engine.eval.judge import Judge, unknown_categories
from engine.rl.guard import OverOptimisationGuard
from engine.rl.held_out import HeldOutEvaluation
from engine.rl.rewards import LayoutReward, Quality, clip_quality
from engine.rl.settings import RewardSettings, RewardWeights
from engine.sample.pipeline import StructMARPipeline
from engine.train.loop import TrainConfig
from engine.train.state import TrainState
from models.frozen.clip_score import load_clip
from models.frozen.detections import DetectorSettings
from models.frozen.faster_rcnn import load_detector
from models.structmar import StructMAR, StructMARConfig
from util.coco import CocoIndex
from util.ema import Ema
from util.rng import generator
from util.types import Category

logger = logging.getLogger(__name__)

FREE_FLAGS = ("max_rl_steps", "num_preview", "reward_batch_size")


def rl_stage(args: argparse.Namespace) -> Stage:
    """Named by its objective: the checkpoints of one are no continuation of another's."""
    return Stage(args.objective, build_prompts, has_pictures=True, keeps_sampling=True, free_flags=FREE_FLAGS)


def build_prompts(args: argparse.Namespace, sizes: StructMARConfig, frozen: Frozen) -> CocoLayoutDataset:
    """Images with at least one box: all, or --num_train_samples drawn by the seed. Pixels where these are
    looked at: for the SFT part, and for the gradient of a reward."""
    data = replace(data_config(args, sizes.img_size, sizes.max_objects), drop_empty=True)
    index = data.load_index()
    if args.num_train_samples is not None:
        index = drawn_images(index, args.num_train_samples, args.seed)
    has_images = args.objective == "reward_gradient" or args.rl_step_ratio < 1
    return build_dataset(args, data, index, frozen, has_images)


def drawn_images(index: CocoIndex, num_images: int, seed: int) -> CocoIndex:
    """So many images of the split, the same for the same seed. Raises ValueError if there are not so many."""
    if num_images > len(index):
        raise ValueError(f"--num_train_samples {num_images} is more than the {len(index)} images with boxes")
    chosen = torch.randperm(len(index), generator=generator(seed, "train samples"))[:num_images].sort().values
    return replace(index, images=tuple(index.images[position] for position in chosen.tolist()))


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


def require_other_judge(args: argparse.Namespace, parts: Parts, detector_id: str) -> None:
    """Raises ValueError if the detector that rewards is to judge too."""
    if parts.scored is not None and parts.scored[1].detector.id == detector_id:
        raise ValueError(
            f"--eval_detector {args.eval_detector} is the detector that rewards (--detector_path): a held-out score "
            "needs another one; --no-online_eval does without"
        )


def require_fitting_start(source: Source, detector_id: str) -> None:
    """Stage 3 starts from a model that knows captions and boxes; a continued run keeps its detector."""
    if source.kind == "scratch" or is_backbone(source):
        raise ValueError(
            f"--resume {source.path or ''}: stage 3 starts from a stage-2 checkpoint, not from MAR's weights"
        )
    if source.kind == "continue" and source.state["reward_detector"] != detector_id:
        raise ValueError(
            f"{source.path} was rewarded by the detector {source.state['reward_detector'][:12]}, --detector_path is "
            f"{detector_id[:12]}: use the same one, or start over in another --output_dir"
        )


def warn_of_guided_samples(parts: Parts) -> None:
    """Says so where the weights are sampled with guidance that training here does not see."""
    deployed = parts.identity.sampling
    if deployed is not None and deployed.is_guided and not parts.sampling.is_guided:
        logger.warning(
            "%s is sampled with guidance (text %g, layout %g), but this run trains it without: little of what it "
            "learns is seen in such samples. Train guidance into the weights first (--train_mode distill)",
            parts.source.path, deployed.cfg_text, deployed.cfg_layout,
        )  # fmt: skip


def warn_of_few_step_head(parts: Parts) -> None:
    """Says so where the weights have a few-step head, which this stage does not train."""
    if parts.config.few_step_head:
        logger.warning(
            "%s has a few-step head, which stays as it is while the rest trains (its conditions move with it): distil "
            "it again from the result (--train_mode few_step)", parts.source.path,
        )  # fmt: skip


def build_held_out(
    args: argparse.Namespace, parts: Parts, pipeline: StructMARPipeline, ema: Ema, keeper: BestKeeper
) -> HeldOutEvaluation | None:
    """As it was when the run stopped, if it continues. None without a detector that judges."""
    online = build_online_evaluation(args, parts, pipeline, ema, keeper)
    if online is None:
        logger.warning("no --eval_detector: nothing here will notice a reward that is being fooled")
        return None
    way_back = partial(where_to_go_back, Path(args.output_dir))
    brake = "--anchor" if args.objective == "reward_gradient" else "--kl_coef"
    guard = OverOptimisationGuard(args.guard, args.guard_drop, args.guard_patience, way_back, brake)
    held_out = HeldOutEvaluation(online, guard)
    if parts.source.kind == "continue":
        held_out.restore(parts.source.state["held_out"])
    return held_out


def extra_content(
    detector_id: str,
    reference: StructMAR | None,
    held_out: HeldOutEvaluation | None,
    state: TrainState,
    keeper: BestKeeper,
) -> Callable[[], dict[str, Any]]:
    """What a checkpoint of this stage holds besides."""

    def extra() -> dict[str, Any]:
        heard = None if held_out is None else held_out.state()
        start = reference_content(reference, state)
        own = {"reward_detector": detector_id, "reference": start, "held_out": heard}
        return own | keeper.content()

    return extra
