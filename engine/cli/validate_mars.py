"""The command line of main_mar.py: which model it is of, and the checks of --backbone mars, before any file is read."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from engine.cli.arguments_mars import OWN, SHARED
from engine.cli.sampling import parse_sampling_args
from engine.cli.sizes import head_of
from engine.cli.validate import check_common, require_path, validate_train_args
from models.mars.stages import JOINT, REFINE, STAGES, UPSCALE
from util.config import parse_args

DEFAULT_SIZE = 256  # pixels of a side
DEFAULT_DROP_PROB = 0.1
LEFT_OUT = {JOINT: (), REFINE: ("caption_weight",), UPSCALE: ("caption_weight", "choice_weight")}
"""Weights of losses that a stage does without."""


def parse_train_args(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> tuple[argparse.Namespace, str | None]:
    """The checked arguments, and what the log says of sampling options that come from the weights."""
    args = parse_args(parser, argv)
    if args.backbone == "mars":
        validate_mars_args(parser, args)
        return args, None
    _refuse(parser, args, OWN, "is for --backbone mars")
    if args.train_mode in STAGES:
        raise ValueError(f"--train_mode {args.train_mode} is for --backbone mars")
    return parse_sampling_args(parser, argv, validate_train_args, head_of)


def validate_mars_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Sets what is not given. Raises ValueError for the first arguments that do not go together, FileNotFoundError for
    a missing path."""
    if args.train_mode not in STAGES:
        stages = f"{', '.join(STAGES[:-1])} or {STAGES[-1]}"
        raise ValueError(f"--backbone mars needs --train_mode {stages}, got {args.train_mode}")
    foreign = [action.dest for action in parser._actions if action.dest not in (*SHARED, *OWN, "help")]
    _refuse(parser, args, foreign, "does not go with --backbone mars, which draws from captions alone")
    for name in LEFT_OUT[args.train_mode]:
        if vars(args)[name]:  # 0 is what a run of it has written down
            _refuse(parser, args, (name,), f"does not go with --train_mode {args.train_mode}, which draws alone")
        setattr(args, name, 0.0)
    if args.train_mode == UPSCALE and args.use_cached:
        why = f"does not go with --train_mode {UPSCALE}, which shrinks pictures, not codes"
        raise ValueError(f"--use_cached {why}: --no-use_cached --cached_path ''")
    if args.resume == "best":
        raise ValueError("--resume best: runs of --backbone mars keep no best weights, name a checkpoint")
    if not args.lm_path:
        raise ValueError("--backbone mars needs --lm_path, the folder of its frozen language model")
    if args.online_eval and not args.eval_split:
        raise ValueError("--online_eval needs --eval_split: with --backbone mars it measures losses on another split")
    if args.img_size is None:
        args.img_size = DEFAULT_SIZE
    if args.label_drop_prob is None:
        args.label_drop_prob = DEFAULT_DROP_PROB
    check_common(args)
    for field in ("coco_root", "vae_path", "lm_path", *(["resume"] if args.resume else [])):
        require_path(field, vars(args)[field])


def _refuse(parser: argparse.ArgumentParser, args: argparse.Namespace, flags: Sequence[str], why: str) -> None:
    """Raises ValueError for the first of these flags that is not at its default: it would do nothing."""
    options = {action.dest: action.option_strings for action in parser._actions}
    for name in flags:
        value = vars(args)[name]
        if value != parser.get_default(name):
            given = options[name][0] if value is not False else f"--no-{name}"
            shown = given if isinstance(value, bool) else f"{given} {value}"
            raise ValueError(f"{shown} {why}")
