"""The flags of MARS in main_mar.py (--backbone mars), and which of the other flags mean something for it."""

from __future__ import annotations

import argparse

from util.config import Switch
from util.ranges import nonnegative_float

BACKBONES = ("mar", "mars")
LM_HELP = "folder of the frozen causal language model, as save_pretrained writes one, with its tokenizer"
OWN = ("lm_path", "lm_precision", "copied_norms", "caption_weight", "choice_weight")
SHARED = (
    "config", "debug", "device", "backbone", "train_mode", "resume", "auto_resume", "output_dir", "log_dir", "seed",
    "vae_path", "img_size", "max_text_tokens", "grad_checkpointing",
    "coco_root", "coco_split", "caption_mode", "crop", "hflip_prob", "use_cached", "cached_path", "check_data",
    "num_workers", "pin_mem", "label_drop_prob",
    "batch_size", "accum_iter", "epochs", "max_steps", "ema_rate", "ema_warmup",
    "lr", "blr", "min_lr", "lr_schedule", "warmup_epochs", "weight_decay", "grad_clip",
    "precision", "fsdp", "num_threads", "profile_steps", "dist_timeout", "log_freq", "save_last_freq",
    "save_freq_steps", "keep_every",
    "cfg", "temperature", "top_k",
    "online_eval", "eval_freq", "eval_images", "eval_split", "eval_bsz", "sample_freq", "num_preview",
)  # fmt: skip
"""Of the other groups. All others are refused beside --backbone mars."""


def add_mars_args(parser: argparse.ArgumentParser) -> None:
    """A language model with visual experts in the place of MAR's blocks."""
    group = parser.add_argument_group(
        "MARS",
        "for --backbone mars, with --train_mode joint (drawing and describing), refine (drawing alone, from joint's "
        "weights) or upscale (drawing at --img_size what the weights of --resume draw smaller)",
    )
    group.add_argument("--backbone", default="mar", choices=BACKBONES,
                       help="MAR's blocks with layouts, or a frozen language model with visual experts")  # fmt: skip
    group.add_argument("--lm_path", metavar="DIR", default="", help=LM_HELP)
    group.add_argument("--lm_precision", default="fp32", choices=["fp32", "bf16"],
                       help="of the frozen language model's weights; experts train in fp32")  # fmt: skip
    group.add_argument("--copied_norms", action=Switch, default=False,
                       help="the norms around attention and MLP have experts as well")  # fmt: skip
    group.add_argument("--caption_weight", type=nonnegative_float, default=1.0,
                       help="of the loss on words, beside that on codes; only --train_mode joint has it")  # fmt: skip
    group.add_argument("--choice_weight", type=nonnegative_float, default=1.0,
                       help="of the loss on when to begin a picture, which trains one row of the head; --train_mode "
                            "upscale has 0")  # fmt: skip
