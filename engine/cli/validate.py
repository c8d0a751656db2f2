"""Checks of combinations of arguments and of paths, before any file is read. One mistake, one line.

The range of a single number stands beside its flag (engine/cli/arguments.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from engine.cli.arguments_rl import rl_parser
from engine.cli.sampling import FLAGS, check_sampling, sampling_config
from engine.cli.sizes import head_of, kl_estimator, model_config, picture_sizes, rl_estimator
from engine.rl.settings import ESTIMATOR_HEADS, FLAGS_OF_GRADIENT, FLAGS_OF_SAMPLES
from engine.train.profile import profiled_steps
from models.config import TRAIN_MODES
from models.sampling.config import OF_STAGE_3
from util.config import told_as_flags
from util.names import BEST_NAME, LAST_NAME
from util.output import require_output_dir


def validate_train_args(args: argparse.Namespace) -> None:
    """Raises ValueError for the first arguments that do not go together, FileNotFoundError for a missing path."""
    if args.train_mode not in TRAIN_MODES:
        raise ValueError(f"--train_mode must be one of {', '.join(TRAIN_MODES)}, got '{args.train_mode}'")
    _choose_by_mode(args, is_distilled=args.train_mode in ("distill", "few_step"))
    _choose_few_step(args)
    is_class = args.train_mode == "class"
    if is_class != bool(args.class_root):
        raise ValueError(
            f"--train_mode class and --class_root belong together, got {args.train_mode} and '{args.class_root}'"
        )
    if is_class:
        _refuse_captions(args)
    if args.phrase_prob and not args.phrases:
        raise ValueError(f"--phrase_prob {args.phrase_prob} is for models with --phrases")
    _check_run(args)
    picture_sizes(args, model_config(args, num_categories=0, text_dim=0))
    needed = ("class_root", "vae_path") if is_class else ("coco_root", "vae_path", "clip_path")
    _require_paths(args, needed, optional=("resume", "eval_detector"))


def _choose_by_mode(args: argparse.Namespace, is_distilled: bool) -> None:
    """Sets what is not given to what goes with the loss. Raises ValueError for conditions dropped where guidance is
    distilled, which is between conditions."""
    if args.label_drop_prob is None:
        args.label_drop_prob = 0.0 if is_distilled else 0.1
    if args.mask_schedule is None and is_distilled:
        args.mask_schedule = "linear"  # a token is sampled beside any share of hidden ones alike
    for flag in ("label_drop_prob", "text_drop_prob", "layout_drop_prob"):
        if is_distilled and vars(args)[flag]:
            raise ValueError(
                f"--{flag} {vars(args)[flag]} does not go with --train_mode {args.train_mode}: its teacher needs "
                "captions and boxes, and drops them itself"
            )


def _choose_few_step(args: argparse.Namespace) -> None:
    """Sets --few_step_head where it is trained. Raises ValueError for it in other modes, and for --fsdp beside it."""
    if args.train_mode != "few_step":
        if args.few_step_head:
            raise ValueError(
                f"--few_step_head does not go with --train_mode {args.train_mode}, which would leave it behind: "
                "--train_mode few_step adds it to the weights when all else is trained"
            )
        return
    args.few_step_head = True
    if args.fsdp:
        raise ValueError("--fsdp does not go with --train_mode few_step, which trains one small network: leave it out")


def _refuse_captions(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that mean captions, boxes, their scores or sizes beside --train_mode class."""
    for flag in ("text_drop_prob", "layout_drop_prob", "online_eval", "buckets", "sizes", "size_condition",
                 "phrases"):  # fmt: skip
        if vars(args)[flag]:
            raise ValueError(
                f"--{flag} {vars(args)[flag]} does not go with --train_mode class, which reads squares and their "
                "classes alone (--label_drop_prob drops these)"
            )


def validate_rl_args(args: argparse.Namespace) -> None:
    """The same for stage 3."""
    _choose_by_mode(args, is_distilled=False)
    _check_run(args)
    if args.crop != "center":
        raise ValueError(f"--crop {args.crop}: stage 3 takes centre crops, a random one may leave no box to reward")
    is_gradient = args.objective == "reward_gradient"
    _refuse_foreign(args, FLAGS_OF_SAMPLES if is_gradient else FLAGS_OF_GRADIENT)
    if args.temperature == 0 and not is_gradient:
        raise ValueError("--temperature 0 samples the same image for a whole group: there is nothing to compare")
    if not args.resume and not (Path(args.output_dir) / LAST_NAME).is_file():
        raise ValueError("--resume is needed: stage 3 starts from a stage-2 checkpoint")
    if (args.w_quality > 0) != bool(args.quality_clip_path):
        raise ValueError(
            f"--w_quality and --quality_clip_path belong together, got {args.w_quality} and '{args.quality_clip_path}'"
        )
    if is_gradient:
        _check_reward_gradient(args)
    else:
        _choose_estimators(args)
        _check_objective(args)
        _check_estimators(args)
    with told_as_flags(FLAGS):
        sampling_config(args).require_uncontrolled(OF_STAGE_3)
    _require_paths(
        args,
        needed=("coco_root", "vae_path", "clip_path", "detector_path"),
        optional=("resume", "eval_detector", "quality_clip_path"),
    )
    for path in args.more_detectors or ():
        require_path("more_detectors", path)


def _refuse_foreign(args: argparse.Namespace, flags: Sequence[str]) -> None:
    """Raises ValueError for a flag of another objective that is not at its default: it would do nothing."""
    parser, values = rl_parser(), vars(args)
    for flag in flags:
        if values[flag] != parser.get_default(flag):
            raise ValueError(f"--{flag} {values[flag]} does not go with --objective {args.objective}")


def _check_reward_gradient(args: argparse.Namespace) -> None:
    head = head_of(args)
    if head != "diffusion":
        raise ValueError(f"--objective reward_gradient needs a diffusion head: no reward has a gradient by codes, "
                         f"which this model's {head} head draws")  # fmt: skip
    if args.mask_schedule is None:
        args.mask_schedule = "linear"  # a token is sampled beside any share of hidden ones alike
    if args.reward_t_min > args.reward_t_max:
        raise ValueError(f"--reward_t_min {args.reward_t_min} is above --reward_t_max {args.reward_t_max}")
    count = 1 + len(args.more_detectors or ())
    if args.detector_weights is not None and len(args.detector_weights) != count:
        given = " ".join(f"{weight:g}" for weight in args.detector_weights)
        raise ValueError(f"--detector_weights {given} must be one for each of the {count} detectors (--detector_path, "
                         "--more_detectors)")  # fmt: skip


def _choose_estimators(args: argparse.Namespace) -> None:
    """Sets --rl_estimator to the head's own and --kl_estimator to the objective's where they are not given. Raises
    ValueError for an estimator of another head."""
    head, chosen = head_of(args), rl_estimator(args)
    args.rl_estimator, args.kl_estimator = chosen, kl_estimator(args)
    if ESTIMATOR_HEADS[chosen] != head:
        raise ValueError(f"--rl_estimator {chosen} is for a {ESTIMATOR_HEADS[chosen]} head, this model's is {head}")


def _check_estimators(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that do not go with --rl_estimator."""
    chosen = args.rl_estimator
    wrong = {"elbo": "exact", "trajectory": "eps", "exact": "eps"}[chosen]
    if args.kl_coef > 0 and args.kl_estimator == wrong:
        raise ValueError(f"--kl_estimator {wrong} does not go with --rl_estimator {chosen}")
    if chosen == "elbo" and args.rl_draws is not None and args.rl_draws % 2:
        raise ValueError(f"--rl_draws must be even for --rl_estimator elbo (each noise goes with its negative), "
                         f"got {args.rl_draws}")  # fmt: skip
    if chosen != "elbo" and (args.rl_t_min, args.rl_t_max) != (0, 1000):
        raise ValueError(f"--rl_t_min {args.rl_t_min} and --rl_t_max {args.rl_t_max} are for --rl_estimator elbo, "
                         f"got {chosen}")  # fmt: skip
    if args.rl_t_min >= args.rl_t_max:
        raise ValueError(f"--rl_t_min {args.rl_t_min} must lie below --rl_t_max {args.rl_t_max}")
    if chosen == "exact":
        if args.rl_draws is not None:
            raise ValueError(f"--rl_draws {args.rl_draws} does not go with --rl_estimator exact, which draws nothing")
        order = args.order or "random"  # where none is given, rollouts have this one
        sampling_config(argparse.Namespace(**(vars(args) | {"order": order}))).require_exact()


def _check_objective(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that do not go with --objective or --credit."""
    scored_by = {"nft": ("elbo",), "best_of": ("elbo", "exact"), "grpo": tuple(ESTIMATOR_HEADS)}[args.objective]
    if args.rl_estimator not in scored_by:
        raise ValueError(
            f"--objective {args.objective} goes with --rl_estimator {' or '.join(scored_by)}, got {args.rl_estimator}"
        )
    for name, owner in (("clip_range", "grpo"), ("nft_beta", "nft")):
        if vars(args)[name] is not None and args.objective != owner:
            raise ValueError(f"--{name} {vars(args)[name]} is for --objective {owner}, got {args.objective}")
    if args.credit == "region":
        for name, value, wrong in (("objective", args.objective, "best_of"), ("adv_norm", args.adv_norm, "batch")):
            if value == wrong:
                raise ValueError(f"--credit region does not go with --{name} {value}")
        if args.w_quality > 0:
            raise ValueError(f"--credit region does not go with --w_quality {args.w_quality}, which is of no region")


def check_common(args: argparse.Namespace) -> None:
    """Combinations of what all trainings have, of whatever model."""
    if args.profile_steps:
        profiled_steps(args.profile_steps, start=0)
    if args.warmup_epochs > args.epochs:
        raise ValueError(f"--warmup_epochs {args.warmup_epochs} is longer than --epochs {args.epochs}")
    if args.use_cached != bool(args.cached_path):
        raise ValueError(
            f"--use_cached and --cached_path belong together, got {args.use_cached} and '{args.cached_path}'"
        )
    if args.use_cached and args.crop != "center":
        raise ValueError(f"caches hold centre crops: --use_cached does not go with --crop {args.crop}")
    require_output_dir("--output_dir", args.output_dir)
    if args.log_dir is not None:
        require_output_dir("--log_dir", args.log_dir)


def _check_run(args: argparse.Namespace) -> None:
    """Combinations of what all stages have."""
    check_common(args)
    rates = {f"--{name}_drop_prob": vars(args)[f"{name}_drop_prob"] for name in ("label", "text", "layout")}
    if sum(rates.values()) > 1 and 1 not in rates.values():  # a rate of 1: the condition is never given
        listed = ", ".join(f"{flag} {rate}" for flag, rate in rates.items())
        raise ValueError(f"{listed} add up to {sum(rates.values()):g}, which is more than 1")
    model_config(args, num_categories=0, text_dim=0)  # do the sizes fit together?
    check_sampling(args)
    if args.keep_best and not (args.online_eval and args.eval_detector):
        raise ValueError(f"--keep_best {args.keep_best} needs its scores: --online_eval and --eval_detector")
    if args.resume == "best":
        args.resume = str(Path(args.output_dir) / BEST_NAME)


def _require_paths(args: argparse.Namespace, needed: Sequence[str], optional: Sequence[str]) -> None:
    values = vars(args)
    for flag in (*needed, *(flag for flag in optional if values[flag])):
        require_path(flag, values[flag])


_DETECTOR_KINDS = "a Faster R-CNN (.pth) or a YOLOX, YOLOv8 or DETR export (.onnx)"
WHERE_TO_GET = {
    "class_root": "it holds train/ with a folder of pictures for each class, see https://image-net.org",
    "coco_root": "it holds annotations/ and the image folders, see https://cocodataset.org/#download",
    "vae_path": "kl16.ckpt is linked from https://github.com/LTH14/mar, vq_ds16_c2i.pt from https://github.com/FoundationVision/LlamaGen",
    "lm_path": "a folder that save_pretrained of transformers wrote: a causal language model and its tokenizer",
    "clip_path": "a local copy of https://huggingface.co/openai/clip-vit-base-patch32, or of a causal language model",
    "detector_path": "fasterrcnn_resnet50_fpn_v2's weights are linked from torchvision's documentation",
    "more_detectors": "a Faster R-CNN (.pth), as --detector_path",
    "eval_detector": _DETECTOR_KINDS,
    "detector": _DETECTOR_KINDS,
    "quality_clip_path": "a local copy of https://huggingface.co/openai/clip-vit-base-patch32",
    "resume": "MAR's weights are linked from https://github.com/LTH14/mar; checkpoints lie in the run folders",
}


FLAG_OF = {"clip_path": "text_encoder"}  # what has another name than its field


def require_path(field: str, path: str) -> None:
    if not Path(path).exists():
        flag = FLAG_OF.get(field, field)
        raise FileNotFoundError(f"--{flag} {path} does not exist; {WHERE_TO_GET[field]}")
