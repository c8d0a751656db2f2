"""The backbone for sampling: what does not change between iterations is computed once, what nobody reads is left out.

`predict_tokens` equals `StructMAR.predict` at the tokens that an iteration uncovers (up to float rounding). Computed
once per sampling run: keys and values of the captions in every layer, the cross-attention of the rows without a caption
(a constant), the rotations of all positions, the decoder's attention bias. Left out: in the last decoder block, all but
the tokens asked for, which need no more of the others than their keys and values.

Shape letters: B rows (images of all guidance branches), L image tokens, K buffer slots, D width, n visible tokens,
p tokens asked for, T text tokens, d head width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from models.blocks import Block, GatedCrossAttention, TextMemory, gather_tokens
from models.conditioning import Conditions
from models.rope import Rotation, with_buffer
from models.structmar import StructMAR


@dataclass(frozen=True)
class PreparedBlock:
    """rotation: of all K + L positions, [1, K + L, d/2]; None without RoPE. memory: None without cross-attention."""

    block: Block
    rotation: Rotation | None
    memory: TextMemory | None


@dataclass(frozen=True)
class Prepared:
    """Built by `prepare`, for one model and one set of conditions. decoder_bias: [B, 1, K + L, K + L] or None."""

    conditions: Conditions
    encoder: tuple[PreparedBlock, ...]
    decoder: tuple[PreparedBlock, ...]
    decoder_bias: Tensor | None


def prepare(model: StructMAR, conditions: Conditions, num_with_text: int) -> Prepared:
    """conditions: of B rows, of which those from `num_with_text` on have no caption, that is, only the null token."""

    def blocks(modules: nn.ModuleList, angles: Tensor) -> tuple[PreparedBlock, ...]:
        table = with_buffer(angles, model.config.buffer_size)[None]  # [1, K + L, d/2]
        return tuple(
            PreparedBlock(
                block,
                block.attn.rotation(table) if model.config.rope_mode != "off" else None,
                _text_memory(block.cross, conditions, num_with_text),
            )
            for block in cast(Iterable[Block], modules)
        )

    return Prepared(
        conditions,
        blocks(model.encoder_blocks, model.rope_angles_encoder),
        blocks(model.decoder_blocks, model.rope_angles_decoder),
        model.decoder_bias(conditions),
    )


def _text_memory(cross: GatedCrossAttention | None, conditions: Conditions, num_with_text: int) -> TextMemory | None:
    if cross is None or conditions.text is None or conditions.text_valid is None:
        return None
    null = conditions.text[num_with_text, 0] if num_with_text < len(conditions.text) else None  # [C]
    return cross.read(conditions.text[:num_with_text], conditions.text_valid[:num_with_text], null)


def predict_tokens(model: StructMAR, prepared: Prepared, tokens: Tensor, kept_ids: Tensor, token_ids: Tensor) -> Tensor:
    """tokens [B, L, C'] of which kept_ids [B, n] are visible -> the head's condition of token_ids [B, p]: [B, p, D]."""
    num_slots = model.config.buffer_size
    slots = torch.arange(num_slots, device=kept_ids.device).expand(len(kept_ids), -1)  # [B, K]
    positions = torch.cat([slots, kept_ids + num_slots], dim=1)  # [B, K + n]
    x = model.encoder_input(tokens, kept_ids, prepared.conditions)  # [B, K + n, D]
    bias = model.encoder_bias(kept_ids, prepared.conditions)  # [B, 1, K + n, K + n]
    for part in prepared.encoder:
        rotation = None if part.rotation is None else part.rotation.at(positions)
        x = part.block.run(x, rotation, bias, part.memory)  # [B, K + n, D]

    x = model.decoder_input(model.encoder_norm(x), kept_ids)  # [B, K + L, D]
    *others, last = prepared.decoder
    for part in others:
        x = part.block.run(x, part.rotation, prepared.decoder_bias, part.memory)  # [B, K + L, D]
    x = last.block.run(x, last.rotation, prepared.decoder_bias, last.memory, token_ids + num_slots)  # [B, p, D]
    position = model.diffusion_pos_embed_learned.expand(len(x), -1, -1)  # [B, L, D]
    return model.decoder_norm(x) + gather_tokens(position, token_ids)  # [B, p, D]
