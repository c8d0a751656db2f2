"""Checks of the arguments alone, before any file is read: ranges and combinations. One mistake, one line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from models.weights import TRAIN_MODES

COCO_MODES = tuple(mode for mode in TRAIN_MODES if mode != "class")

Check = tuple[Callable[[float], bool], str]
POSITIVE: Check = (lambda value: value > 0 and math.isfinite(value), "must be positive")
NOT_NEGATIVE: Check = (lambda value: value >= 0 and math.isfinite(value), "must not be negative")
FRACTION: Check = (lambda value: 0 <= value <= 1, "must lie in [0, 1]")
BELOW_ONE: Check = (lambda value: 0 <= value < 1, "must lie in [0, 1)")

RULES: dict[str, Check] = {
    **dict.fromkeys(("batch_size", "accum_iter", "epochs", "max_steps", "log_freq", "save_last_freq", "lr", "eval_bsz",
                     "num_preview", "num_threads", "eval_freq", "latent_scale", "class_num", "diffloss_d", "diffloss_w",
                     "num_iter", "num_sampling_steps", "eval_images"), POSITIVE),
    **dict.fromkeys(("blr", "min_lr", "warmup_epochs", "weight_decay", "grad_clip", "num_workers", "save_freq_steps",
                     "sample_freq", "seed", "temperature"), NOT_NEGATIVE),
    **dict.fromkeys(("label_drop_prob", "text_drop_prob", "layout_drop_prob", "hflip_prob", "min_area",
                     "min_visibility", "ema_rate"), FRACTION),
    **dict.fromkeys(("attn_dropout", "proj_dropout"), BELOW_ONE),
    "mask_ratio_min": (lambda value: 0 < value < 1, "must lie in (0, 1)"),
}  # fmt: skip


def validate_train_args(args: argparse.Namespace) -> None:
    """Raises ValueError for the first argument out of its range, FileNotFoundError for a missing path."""
    values = vars(args)
    for name, (holds, message) in RULES.items():
        if values[name] is not None and not holds(values[name]):
            raise ValueError(f"--{name} {message}, got {values[name]}")
    if args.train_mode == "class":
        raise ValueError("--train_mode class needs class labels, COCO has none: it is for pretraining scripts")
    if args.train_mode not in COCO_MODES:
        raise ValueError(f"--train_mode must be one of {', '.join(COCO_MODES)}, got '{args.train_mode}'")
    if args.warmup_epochs > args.epochs:
        raise ValueError(f"--warmup_epochs {args.warmup_epochs} is longer than --epochs {args.epochs}")
    if args.use_cached != bool(args.cached_path):
        raise ValueError(
            f"--use_cached and --cached_path belong together, got {args.use_cached} and '{args.cached_path}'"
        )
    if args.use_cached and args.crop != "center":
        raise ValueError(f"caches hold centre crops: --use_cached does not go with --crop {args.crop}")
    if not args.output_dir:
        raise ValueError("--output_dir is empty")
    if Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        raise ValueError(f"--output_dir {args.output_dir} is a file")
    for flag in ("coco_root", "vae_path", "clip_path"):
        require_path(flag, values[flag])
    for flag in ("resume", "eval_detector"):
        if values[flag]:
            require_path(flag, values[flag])


WHERE_TO_GET = {
    "coco_root": "it holds annotations/ and the image folders, see https://cocodataset.org/#download",
    "vae_path": "kl16.ckpt is linked from https://github.com/LTH14/mar",
    "clip_path": "a local copy of https://huggingface.co/openai/clip-vit-base-patch32",
    "eval_detector": "a Faster R-CNN (.pth) or a YOLOX export (.onnx)",
    "resume": "MAR's weights are linked from https://github.com/LTH14/mar; checkpoints lie in the run folders",
}


def require_path(flag: str, path: str) -> None:
    if not Path(path).exists():
        raise FileNotFoundError(f"--{flag} {path} does not exist; {WHERE_TO_GET[flag]}")
