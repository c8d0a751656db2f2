"""Flags of the model: its sizes, and the kinds of its parts. What a flag does not say is the preset's."""

from __future__ import annotations

import argparse
import math

from models.config import (
    HEADS,
    LARGEST_SIZE,
    MLPS,
    NORM_POSITIONS,
    NORMS,
    QK_NORMS,
    ROPE_AXES,
    ROPE_MODES,
    ROPE_SCALES,
    TRUNKS,
)
from util.config import Switch
from util.ranges import Range, depth_int, fraction_below_one, nonnegative_int, pixels_int, whole, width_int

SWITCH = Switch


def add_model_args(parser: argparse.ArgumentParser) -> None:
    """What the network is. None stands for the preset's own value."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="mar_huge",
        help="preset: mar_mini, _base, _large or _huge; maskgil_mini, ..., _xlarge or _xxlarge",
    )
    group.add_argument(
        "--img_size", type=pixels_int, default=None, help="side of the square images in pixels (the preset's)"
    )
    group.add_argument(
        "--vae_embed_dim", type=width_int, default=None, help="latent channels of the VAE (the preset's)"
    )
    group.add_argument("--vae_stride", type=whole(1, 256), default=None, help="pixels per latent cell (the preset's)")
    group.add_argument(
        "--patch_size", type=whole(1, 64), default=None, help="latent cells per token side (the preset's)"
    )
    group.add_argument(
        "--class_num", type=whole(1, 10**6), default=None, help="rows of MAR's class embedding (the preset's)"
    )
    group.add_argument(
        "--buffer_size",
        type=whole(1, 4096),
        default=None,
        help="condition slots before the image tokens (the preset's)",
    )
    group.add_argument("--diffloss_d", type=depth_int, default=None, help="depth of the diffusion head (the preset's)")
    group.add_argument("--diffloss_w", type=width_int, default=None, help="width of the diffusion head (the preset's)")
    group.add_argument(
        "--max_objects", type=whole(1, 4096), default=None, help="layout slots; at most --buffer_size (the preset's)"
    )
    group.add_argument(
        "--diffusion_batch_mul", type=whole(1, 1024), default=1, help="noise draws per masked token and step"
    )
    group.add_argument(
        "--attn_dropout", type=fraction_below_one, default=None, help="dropout of attention weights (the preset's)"
    )
    group.add_argument(
        "--proj_dropout", type=fraction_below_one, default=None, help="dropout of projections (the preset's)"
    )
    group.add_argument(
        "--grad_checkpointing", action=SWITCH, default=False, help="recompute blocks in backward: less memory"
    )
    group.add_argument("--rope_mode", default=None, choices=ROPE_MODES,
                       help="2D RoPE with a learnable strength, at full strength, or not at all "
                            "(the preset's: gated for MAR, full for MaskGIL)")  # fmt: skip
    group.add_argument("--learned_pos", action=SWITCH, was="no_learned_pos", default=None,
                       help="MAR's learned position embeddings (the preset's)")  # fmt: skip
    group.add_argument("--rope_scale", default=None, choices=ROPE_SCALES,
                       help="positions on grids of other sizes than --img_size's: counted in tokens, or scaled to as "
                            "large an area (the preset's)")  # fmt: skip
    group.add_argument("--size_condition", action=SWITCH, default=None,
                       help="the model is told the picture's size, its image's and where it was cut "
                            "(the preset's)")  # fmt: skip
    group.add_argument("--layout_bias_value", type=Range(float, "must not be negative", 0, math.inf), default=math.inf,
                       help="subtracted from the logits of foreign layout tokens; inf forbids them")  # fmt: skip
    group.add_argument(
        "--layout_bias_encoder", action=SWITCH, default=True, help="the layout attention bias in the encoder's blocks"
    )
    group.add_argument(
        "--layout_bias_decoder", action=SWITCH, default=True, help="the layout attention bias in the decoder's blocks"
    )
    group.add_argument(
        "--layout_fourier", action=SWITCH, default=True, help="boxes enter as Fourier features, else as four numbers"
    )
    group.add_argument("--phrases", action=SWITCH, default=False,
                       help="boxes may have a phrase beside or instead of their class")  # fmt: skip
    group.add_argument("--few_step_head", action=SWITCH, default=False,
                       help="a second network of the diffusion head, which draws in a few evaluations")  # fmt: skip
    group.add_argument("--cross_attn_every", type=nonnegative_int, default=1,
                       help="every k-th block attends to the caption; 0: none, the pooled text is left")  # fmt: skip
    add_family_args(parser)


def add_family_args(parser: argparse.ArgumentParser) -> None:
    """Trunk, head and kinds of blocks. None stands for the preset's own value."""
    group = parser.add_argument_group("trunk and head")
    group.add_argument("--trunk", default=None, choices=TRUNKS,
                       help="MAE's encoder and decoder, or one stack over all tokens (the preset's)")  # fmt: skip
    group.add_argument("--head", default=None, choices=HEADS,
                       help="continuous tokens by diffusion, or codes of a codebook (the preset's)")  # fmt: skip
    group.add_argument("--codebook_size", type=whole(0, LARGEST_SIZE), default=None,
                       help="codes of the tokenizer; 0 for --head diffusion (the preset's)")  # fmt: skip
    group.add_argument("--code_dim", type=whole(0, LARGEST_SIZE), default=None,
                       help="channels of a code where a token holds several; 0: the width (the preset's)")  # fmt: skip
    group.add_argument("--norm", default=None, choices=NORMS, help="LayerNorm or RMSNorm (the preset's)")
    group.add_argument("--mlp", default=None, choices=MLPS, help="kind of the blocks' MLPs (the preset's)")
    group.add_argument("--norm_position", default=None, choices=NORM_POSITIONS,
                       help="norms before attention and MLP, or behind them (the preset's)")  # fmt: skip
    group.add_argument("--qk_norm", default=None, choices=QK_NORMS,
                       help="norm of queries and keys: by head, or over all heads (the preset's)")  # fmt: skip
    group.add_argument("--rope_axes", default=None, choices=ROPE_AXES,
                       help="whether a head's first half turns with the column or the row (the preset's)")  # fmt: skip
    group.add_argument("--linear_bias", action=SWITCH, default=None,
                       help="linears of the blocks have a bias (the preset's)")  # fmt: skip
