"""The sizes of a model from parsed arguments: the preset's, with what the flags replace."""

from __future__ import annotations

import argparse

from engine.rl.settings import DEFAULT_ESTIMATORS
from models.config import StructMARConfig, preset_config
from util.buckets import Size, bucket_cell, bucket_sizes, read_size
from util.config import told_as_flags

PRESET_FIELDS = ("img_size", "vae_embed_dim", "vae_stride", "patch_size", "class_num", "buffer_size", "diffloss_d",
                 "diffloss_w", "max_objects", "attn_dropout", "proj_dropout", "rope_mode", "learned_pos", "trunk",
                 "head", "codebook_size", "code_dim", "norm", "mlp", "norm_position", "qk_norm", "rope_axes",
                 "linear_bias", "loss_on", "label_smoothing", "rope_scale", "size_condition")  # fmt: skip


@told_as_flags(PRESET_FIELDS)
def model_config(args: argparse.Namespace, num_categories: int, text_dim: int) -> StructMARConfig:
    """The preset with what the flags replace. Raises ValueError for an unknown preset or sizes that do not fit.

    num_categories, text_dim: 0 before they are known; the model then has no parts for phrases either."""
    values = vars(args)
    chosen = {name: values[name] for name in PRESET_FIELDS if values[name] is not None}
    return preset_config(
        args.model,
        num_categories=num_categories,
        text_dim=text_dim,
        diffusion_batch_mul=args.diffusion_batch_mul,
        grad_checkpointing=args.grad_checkpointing,
        layout_bias_value=args.layout_bias_value,
        layout_bias_encoder=args.layout_bias_encoder,
        layout_bias_decoder=args.layout_bias_decoder,
        layout_fourier=args.layout_fourier,
        cross_attn_every=args.cross_attn_every,
        few_step_head=args.few_step_head,
        phrases=args.phrases and num_categories > 0 and text_dim > 0,
        **chosen,
    )


def head_of(args: argparse.Namespace) -> str:
    """The token head of `model_config`."""
    return model_config(args, num_categories=0, text_dim=0).head


def picture_sizes(args: argparse.Namespace, config: StructMARConfig) -> tuple[Size, ...]:
    """(height, width) of the pictures of stages 1 and 2; none: squares of the model's `img_size`.

    Raises ValueError for both flags, sizes that the model cannot have, and learned positions.
    """
    if args.buckets and args.sizes:
        raise ValueError(f"--buckets are the sizes of --img_size {config.img_size}: they do not go with --sizes")
    step = config.vae_stride * config.patch_size
    sizes = tuple(dict.fromkeys(read_size(text) for text in args.sizes or ()))
    if args.buckets:
        sizes = bucket_sizes(config.img_size, bucket_cell(config.img_size, step))
    if sizes and config.learned_pos:
        flag = "--buckets" if args.buckets else "--sizes"
        raise ValueError(f"{flag}: learned positions are of one size alone, add --no-learned_pos")
    for size in sizes:
        config.grid_of(size)
    return sizes


def kl_estimator(args: argparse.Namespace) -> str:
    """--kl_estimator, or the one of the objective."""
    return args.kl_estimator or ("eps" if args.objective == "nft" else "k3")


def rl_estimator(args: argparse.Namespace) -> str:
    """--rl_estimator, or the one of the model's head."""
    return args.rl_estimator or DEFAULT_ESTIMATORS[head_of(args)]
