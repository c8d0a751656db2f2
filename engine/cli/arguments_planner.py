"""The flags of planners: their training (scripts/train_planner.py) and what proposes layouts elsewhere."""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.cli.arguments import (
    SWITCH,
    add_config_arg,
    add_device_arg,
    add_optim_args,
    add_text_encoder_args,
    add_timeout_arg,
    script_parser,
)
from util.ranges import (
    Range,
    batch_int,
    depth_int,
    fraction,
    fraction_below_one,
    nonnegative_int,
    pixels_int,
    positive_int,
    seed_int,
    threads_int,
    whole,
    width_int,
    workers_int,
)

AUTO = "auto"  # in place of a layout file's name
MAX_TEMPERATURE = 10.0
MAX_OBJECTS = 256
temperature_float = Range(float, f"must lie in [0, {MAX_TEMPERATURE:g}]", 0, MAX_TEMPERATURE)
stop_fraction = Range(float, "must lie in (0, 1)", 0, 1, "()")


def planner_parser(description: str | None) -> argparse.ArgumentParser:
    """The parser of scripts/train_planner.py."""
    parser = script_parser("scripts.train_planner", description)
    add_config_arg(parser)
    add_data_args(parser)
    add_size_args(parser)
    add_training_args(parser)
    add_optim_args(parser)
    add_run_args(parser)
    parser.set_defaults(lr=1e-3, lr_schedule="cosine", warmup_epochs=1.0, weight_decay=0.05, grad_clip=1.0)
    parser.set_defaults(fsdp=False, check_data=False)  # what main_mar.py can do besides
    return parser


def add_annotation_args(group: argparse._ActionsContainer, split: str) -> None:
    """Which captions and boxes are read, and how boxes are cropped: all programs of planners alike."""
    group.add_argument("--coco_root", default="./data/coco", help="folder with annotations/; no image is read")
    group.add_argument("--coco_split", default=split, help="a split with captions_ and instances_ json files")
    group.add_argument("--held_out_every", type=nonnegative_int, default=0,
                       help="every so manieth image by id is left out of training and scored; 0: none is left out, "
                            "all are scored")  # fmt: skip
    group.add_argument("--img_size", type=pixels_int, default=256, help="side of the centre crop that boxes are of")
    group.add_argument(
        "--min_area", type=fraction, default=0.01, help="smallest box kept, as a fraction of the crop's area"
    )
    group.add_argument(
        "--min_visibility", type=fraction, default=0.2, help="smallest fraction of a box left by the crop"
    )
    add_text_encoder_args(group)


def add_data_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    add_annotation_args(group, "train2017")
    group.add_argument("--stop_share", type=stop_fraction, default=0.05,
                       help="share of the training images that decides which weights are kept")  # fmt: skip
    group.add_argument("--hflip_prob", type=fraction, default=0.5, help="probability of mirroring the boxes")
    group.add_argument("--cached_path", default="", help="folder of scripts.cache_latents: its text/ is read")
    group.add_argument("--num_workers", type=workers_int, default=0, help="data loading processes")


def add_size_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("planner")
    group.add_argument("--width", type=width_int, default=256, help="channels")
    group.add_argument("--depth", type=depth_int, default=4, help="blocks")
    group.add_argument("--num_heads", type=whole(1, 1024), default=4, help="heads of each attention")
    group.add_argument("--num_bins", type=whole(2, 4096), default=64, help="places that a corner may have")
    group.add_argument("--max_objects", type=whole(1, MAX_OBJECTS), default=16, help="the largest boxes are kept")
    group.add_argument("--dropout", type=fraction_below_one, default=0.1, help="in blocks and embeddings")


def add_training_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--batch_size", type=batch_int, default=64, help="captions per process and step")
    group.add_argument("--epochs", type=positive_int, default=30, help="an epoch has one caption of each image")
    group.add_argument("--max_steps", type=positive_int, default=None, help="stop after this many steps")
    group.add_argument("--ema_rate", type=fraction, default=0.999, help="decay of the weights' average")
    group.add_argument(
        "--eval_freq", type=positive_int, default=200, help="steps between losses on the images of --stop_share"
    )
    group.add_argument("--patience", type=nonnegative_int, default=0,
                       help="evaluations without a better loss after which the run ends; 0: it does not")  # fmt: skip


def add_run_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", default="./output/planner", help="run folder")
    group.add_argument("--log_dir", default=None, help="TensorBoard folder; None: tensorboard/ in --output_dir")
    group.add_argument("--auto_resume", action=SWITCH, default=True,
                       help="continue from a checkpoint-last.pth found in --output_dir; else start over")  # fmt: skip
    group.add_argument("--seed", type=seed_int, default=1, help="every draw is derived from it")
    group.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help="bf16: autocast")
    group.add_argument("--num_threads", type=threads_int, default=None, help="CPU threads (None: PyTorch's choice)")
    group.add_argument("--log_freq", type=positive_int, default=20, help="steps between log lines")
    group.add_argument("--save_freq_steps", type=positive_int, default=200, help="steps between saves")
    add_device_arg(group)
    add_timeout_arg(group)


def add_proposal_args(group: argparse._ActionsContainer) -> None:
    """A planner that proposes layouts."""
    group.add_argument(
        "--planner_path", default=None, help="planner.safetensors of scripts.train_planner, for --layout auto"
    )
    add_temperature_arg(group)


def add_temperature_arg(group: argparse._ActionsContainer) -> None:
    group.add_argument("--planner_temperature", type=temperature_float, default=0.7,
                       help="of proposed layouts: 1 as trained, less: likelier ones, 0: the likeliest")  # fmt: skip


def check_proposal(args: argparse.Namespace, has_caption: bool) -> None:
    """Raises ValueError or FileNotFoundError for --layout auto without a planner or a caption, or a planner without it.
    has_caption: whether one is written, spoken or taken from a dataset."""
    is_auto = args.layout == AUTO
    if is_auto and not args.planner_path:
        raise ValueError("--layout auto needs --planner_path, the planner that proposes layouts")
    if args.planner_path and not is_auto:
        raise ValueError(f"--planner_path {args.planner_path} needs --layout auto, got --layout {args.layout}")
    if is_auto and not has_caption:
        raise ValueError("--layout auto needs a caption: --prompt, --speech or --coco_root")
    if is_auto and args.image:
        raise ValueError(f"--layout auto does not go with --image {args.image}, whose objects are where they are")
    if args.planner_path:
        require_planner(args.planner_path)


def require_planner(path: str) -> None:
    """Raises FileNotFoundError if nothing is there."""
    if not Path(path).exists():
        raise FileNotFoundError(f"planner not found: {path} (--planner_path)")


def check_planner_args(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that contradict one another."""
    if args.width % args.num_heads:
        raise ValueError(f"--width {args.width} is no multiple of --num_heads {args.num_heads}")
