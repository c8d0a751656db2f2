"""The flags of programs that use MARS weights, and which of `scripts.sample`'s mean something for them."""

from __future__ import annotations

import argparse
from collections.abc import Collection

from engine.cli.arguments import SWITCH, VAE_HELP
from models.config import PRECISIONS
from util.ranges import batch_int, threads_int

TAKEN = frozenset({
    "resume", "lm_path", "ema", "vae_path", "allow_other_frozen", "prompt", "coco_root", "coco_split", "num_images",
    "seed", "size", "cfg", "cfg_text", "temperature", "top_k", "negative_prompt", "batch_size", "precision", "device",
    "num_threads", "output_dir", "grid_columns", "grid_scale", "config", "debug", "upscale",
})  # fmt: skip
"""What `scripts.sample` takes beside --lm_path."""
_NAMES = {"clip_path": "text_encoder"}
GUIDANCE = 5.0  # of `DrawOptions`, which needs PyTorch
LM_HELP = "local Hugging Face directory of the language model that MARS weights were trained with"


def add_lm_arg(group: argparse._ActionsContainer) -> None:
    group.add_argument("--lm_path", default=None, metavar="DIR", help=f"{LM_HELP}; it draws from captions alone, "
                       f"under --cfg {GUIDANCE:g} unless --cfg or --cfg_text is given")  # fmt: skip
    group.add_argument("--upscale", default=None, metavar="FILE",
                       help="with --lm_path: weights of stage III, which make the pictures larger")  # fmt: skip


def add_mars_args(parser: argparse.ArgumentParser) -> None:
    """Weights and frozen parts, of programs for MARS alone."""
    group = parser.add_argument_group("weights")
    group.add_argument("--resume", required=True, help="training checkpoint or its folder, or exported .safetensors")
    group.add_argument(
        "--ema",
        action=SWITCH,
        default=True,
        help="a checkpoint's averaged weights, where it has some, else its raw ones",
    )
    group.add_argument("--lm_path", required=True, metavar="DIR", help=LM_HELP)
    group.add_argument("--vae_path", required=True, help=VAE_HELP)
    group.add_argument("--allow_other_frozen", action=SWITCH, default=False,
                       help="take a language model or a tokenizer other than the one trained with")  # fmt: skip


def add_mars_run_args(parser: argparse.ArgumentParser) -> None:
    """How they are run. --device is the caller's."""
    group = parser.add_argument_group("run")
    group.add_argument("--batch_size", type=batch_int, default=8, help="images at a time")
    group.add_argument("--precision", default="fp32", choices=PRECISIONS, help="of weights and matrix products")
    group.add_argument("--num_threads", type=threads_int, default=None, help="CPU threads (None: PyTorch's choice)")


def require_mars_flags(args: argparse.Namespace, given: Collection[str]) -> None:
    """Raises ValueError for a flag of `scripts.sample` that was given and means nothing for MARS."""
    for name in sorted(set(given) - TAKEN):
        if vars(args)[name]:
            value = vars(args)[name]
            told = " ".join(map(str, value)) if isinstance(value, list) else value
            raise ValueError(
                f"--{_NAMES.get(name, name)} {told} does not go with --lm_path: MARS draws from captions alone, "
                "without layouts, parts of pictures, speech or iterations"
            )
    if args.upscale and args.size is not None:
        raise ValueError(f"--size {args.size} does not go with --upscale, whose sizes its weights name")
    if bool(args.coco_root) == (args.prompt is not None):
        raise ValueError("with --lm_path say what to generate by exactly one of --prompt, --coco_root")
