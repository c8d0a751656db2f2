"""From a config to its token head, and to what embeds the head's tokens for the trunk."""

from __future__ import annotations

from torch import nn

from models.config import StructMARConfig
from models.heads.diffloss import DiffLoss
from models.heads.discrete import CodeEmbedding, DiscreteHead


def build_embedding(config: StructMARConfig) -> nn.Module:
    """[..., C] tokens -> [..., D]. Codes that are drawn one by one come as [..., n], all of a token together."""
    if config.head == "diffusion":
        return nn.Linear(config.token_dim, config.encoder_embed_dim)
    num_codes, width = config.patch_size**2, config.encoder_embed_dim
    can_hide = config.codes_per_token > 1
    return CodeEmbedding(config.codebook_size, num_codes, config.code_dim or width, width, can_hide)


def build_diffusion_head(config: StructMARConfig) -> DiffLoss:
    return DiffLoss(
        config.token_dim,
        config.decoder_embed_dim,
        config.diffloss_w,
        config.diffloss_d,
        config.grad_checkpointing,
        config.few_step_head,
    )


def build_discrete_head(config: StructMARConfig) -> DiscreteHead:
    width = config.decoder_embed_dim
    return DiscreteHead(
        config.codebook_size,
        config.token_dim,
        config.patch_size**2,
        width,
        config.code_dim or width,
        config.label_smoothing,
    )
