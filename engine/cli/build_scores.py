"""What is scored while a run trains, and what by."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from engine.checkpoint.identity import require_same_categories
from engine.eval.judge import Judge
from engine.eval.profiles import load_profile
from engine.eval.targets import EvalSet, load_eval_set
from models.config import StructMARConfig
from models.frozen.detections import DetectorSettings
from models.frozen.faster_rcnn import load_detector
from util.types import Category


def build_online_targets(
    args: argparse.Namespace, config: StructMARConfig, categories: Sequence[Category], device: torch.device
) -> tuple[EvalSet, Judge] | None:
    """What --online_eval scores and what by; None without a detector. Raises ValueError where the parts do not fit."""
    if not (args.online_eval and args.eval_detector):
        return None
    profile = load_profile(args.eval_profile)
    if profile.resolution != config.img_size or profile.max_objects > config.max_objects:
        raise ValueError(
            f"--eval_profile {profile.name} has {profile.resolution} px and up to {profile.max_objects} objects, "
            f"the model {config.img_size} px and {config.max_objects}"
        )
    eval_set = load_eval_set(args.coco_root, profile, args.eval_split or None, max_images=args.eval_images)
    require_same_categories(eval_set.categories, categories, f"--coco_root {args.coco_root} {eval_set.split}")
    settings = DetectorSettings(profile.min_score, profile.nms_iou, profile.max_detections)
    return eval_set, Judge.of(load_detector(args.eval_detector, device, settings), eval_set.categories)
