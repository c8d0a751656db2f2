"""The flags of how images are drawn. None stands for the head's own default (`engine/cli/sampling.py`)."""

from __future__ import annotations

import argparse

from models.config import MAX_HEAD_EVALS, MAX_SCALE, NUM_TRAIN_STEPS
from models.sampling.config import (
    CFG_SCHEDULES,
    MAX_CHOICE_TEMPERATURE,
    MAX_CLIP_X0,
    MAX_GUIDANCE,
    MAX_TEMPERATURE,
    ORDERS,
    SCHEDULES,
)
from util.config import Switch
from util.ranges import Range, batch_int, fraction, or_none, positive_fraction, positive_int, whole

guidance_float = Range(float, f"must lie in [0, {MAX_GUIDANCE:g}]", 0, MAX_GUIDANCE)
temperature_float = Range(float, "must not be negative", 0, MAX_TEMPERATURE)
steps_int = whole(1, NUM_TRAIN_STEPS)
choice_float = Range(float, f"must lie in [0, {MAX_CHOICE_TEMPERATURE:g}]", 0, MAX_CHOICE_TEMPERATURE)
scale_float = Range(float, f"must lie in [0, {MAX_SCALE:g}]", 0, MAX_SCALE)
threshold_float = Range(float, "must lie in [0, 1)", 0, 1, "[)")
clip_float = Range(float, "must be positive", 0, MAX_CLIP_X0, "(]")


def text_or_none(text: str) -> str | None:
    """The word "none" undoes what a file or the weights say."""
    return None if text.strip().lower() == "none" else text


def add_sampling_args(parser: argparse.ArgumentParser) -> None:
    """How images are drawn from the model."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--num_iter", type=batch_int, default=None,
                       help="autoregressive iterations per image; None: 64, or (discrete head) 8")  # fmt: skip
    group.add_argument("--num_sampling_steps", type=steps_int, default=None,
                       help="diffusion steps per token; None: 100")  # fmt: skip
    group.add_argument(
        "--cfg", type=guidance_float, default=1.0, help="guidance scale of text and layout together; 1: none"
    )
    group.add_argument(
        "--cfg_text", type=or_none(guidance_float), default=None, help="guidance scale of the text; None: --cfg"
    )
    group.add_argument(
        "--cfg_layout", type=or_none(guidance_float), default=None, help="guidance scale of the layout; None: --cfg"
    )
    group.add_argument(
        "--cfg_schedule", default="linear", choices=CFG_SCHEDULES,
        help="guidance grows with the tokens that are unmasked, is the same in all iterations, or grows with these"
    )  # fmt: skip
    group.add_argument(
        "--temperature", type=temperature_float, default=1.0,
        help="factor on the noise of the reverse diffusion steps; what the logits of codes are divided by"
    )  # fmt: skip
    group.add_argument(
        "--clip_x0", type=or_none(clip_float), default=None, help="bound on predicted latents, in standard deviations"
    )
    group.add_argument(
        "--t_max", type=or_none(whole(0, NUM_TRAIN_STEPS - 1)), default=None,
        help="first diffusion timestep of sampling; None: the last one, 999 (950 with --num_sampling_steps_last)"
    )  # fmt: skip
    group.add_argument(
        "--num_sampling_steps_last", type=or_none(steps_int), default=None,
        help="diffusion steps per token in the last iteration, linear from --num_sampling_steps in the first; "
             "None: the same in all"
    )  # fmt: skip
    group.add_argument(
        "--head_evals", type=or_none(whole(1, MAX_HEAD_EVALS)), default=None,
        help="evaluations per token of the few-step head, of weights that have one, instead of diffusion steps; "
             "None: diffusion steps"
    )  # fmt: skip
    group.add_argument(
        "--order", default=None, choices=ORDERS,
        help="in which tokens are unmasked: at random, one colour of a checkerboard first, evenly spread (the "
             "fixed way is Halton-MaskGIT's), row by row, or (discrete head) by confidence; None: random, or confidence"
    )  # fmt: skip
    group.add_argument(
        "--schedule", default=None, choices=SCHEDULES,
        help="how many tokens an iteration unmasks: MAR's cosine, MaskGIL's five, or Halton-MaskGIT's; None: mar, or "
             "(discrete head) arccos"
    )  # fmt: skip
    group.add_argument(
        "--choice_temperature", type=choice_float, default=None,
        help="noise on the confidences of the first iteration, falling to 0 in the last; for --order confidence; "
             "None: 4.5"
    )  # fmt: skip
    group.add_argument(
        "--top_k",
        type=or_none(whole(1, 10**6)),
        default=None,
        help="likeliest codes that are drawn from; None: all",
    )
    group.add_argument(
        "--top_p", type=or_none(positive_fraction), default=None,
        help="draw from the likeliest codes up to the first with which their share exceeds this; None: all"
    )  # fmt: skip
    group.add_argument(
        "--guidance_interval", type=fraction, nargs=2, default=[0.0, 1.0],
        help="guidance begins and ends at these shares of the iterations; before and after, there is none"
    )  # fmt: skip
    group.add_argument(
        "--uncond_refresh", type=positive_int, default=1,
        help="guidance runs the branches without text or layout in every k-th iteration and reuses their result in "
             "between; 1: in all"
    )  # fmt: skip
    group.add_argument(
        "--prefix_k", type=whole(0, 10**6), default=0,
        help="tokens that are drawn before, row by row, one in an iteration at constant guidance; --num_iter is then "
             "that of the others"
    )  # fmt: skip
    add_layout_control_args(parser)


def add_layout_control_args(parser: argparse.ArgumentParser) -> None:
    """What steers the layout while an image is drawn (`models/sampling/README.md`)."""
    group = parser.add_argument_group("layout control")
    group.add_argument(
        "--layout_schedule", type=fraction, nargs=2, default=[1.0, 0.0], metavar=("ON", "DECAY"),
        help="the layout counts until this share of the image is visible, and fades out over this much more; "
             "1 0: always"
    )  # fmt: skip
    group.add_argument(
        "--layout_scale", type=scale_float, default=1.0, help="strength of boxes that have none of their own; 0: none"
    )
    group.add_argument(
        "--drop_grounding_tokens", action=Switch, default=False,
        help="boxes do not enter as a layout; with --mask_threshold, those found in the caption do from --start_step on"
    )  # fmt: skip
    group.add_argument(
        "--mask_threshold", type=or_none(threshold_float), default=None,
        help="boxes reach where the caption's attention to their phrase, scaled to [0, 1], exceeds this; None: as given"
    )  # fmt: skip
    group.add_argument(
        "--start_step", type=or_none(positive_int), default=None, help="with --mask_threshold: the first such iteration"
    )
    group.add_argument(
        "--auto_update", action=Switch, default=False, help="with --mask_threshold: in every iteration from then on"
    )
    group.add_argument(
        "--negative_prompt", type=text_or_none, default=None, help="what guidance by the caption leads away from"
    )
