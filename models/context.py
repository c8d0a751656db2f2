"""What a pass over the backbone needs besides its tokens, and where it is computed.

`Trunk.prepare` makes a `Context` of conditions, in one of two ways:

- For training: nothing is computed ahead. Every block computes its rotation and its text keys and values inside its own
  call, where gradients, checkpointing, compiling and sharding see them.
- For sampling (a dtype is given): computed once are the rotations of all positions, the captions' keys and values in
  every layer, and the cross-attention of the rows without a caption (a constant). Weights are cast or packed once
  (`models/inference.py`).

Shape letters: B rows (images of all guidance branches), L image tokens, K buffer slots, D width, n visible tokens,
p tokens asked for, T text tokens, C text channels, d head width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention_maps import AttentionWatch
from models.blocks import Block, GatedCrossAttention, TextKV
from models.compiled import compiled
from models.conditioning import Conditions
from models.heads.base import HeadSampler
from models.rope import Rotation

if TYPE_CHECKING:
    from models.trunk import Trunk


class Layer(Protocol):
    """A block together with what it needs besides its tokens."""

    def __call__(
        self, x: Tensor, positions: Tensor | None, bias: Tensor | None, query_ids: Tensor | None = None
    ) -> Tensor:
        """x: [B, m, D] at positions [B, m] of buffer and image (None: all); bias: [B, 1, m, m]; query_ids: [B, p], the
        tokens to compute (None: all); gives [B, p, D]."""

    def first(self, num_images: int) -> Layer:
        """The same for the first images alone."""

    def scaled(self, value_scale: Tensor | None) -> Layer:
        """The same with other factors [B, N] on the values of the first slots."""


@dataclass(frozen=True)
class TrainingLayer:
    """Everything is computed in the block's own call. angles: [K + L, d/2], None without RoPE. value_scale: [B, N], of
    the first slots, None: 1 throughout."""

    block: Block
    angles: Tensor | None
    text: Tensor | None
    text_valid: Tensor | None
    is_checkpointed: bool
    value_scale: Tensor | None

    def __call__(
        self, x: Tensor, positions: Tensor | None, bias: Tensor | None, query_ids: Tensor | None = None
    ) -> Tensor:
        angles = self.angles
        if angles is not None:
            angles = angles[None] if positions is None else angles[positions]  # [1 or B, m, d/2]
        inputs = (x, angles, bias, self.text, self.text_valid, query_ids, self.value_scale)
        if self.is_checkpointed and torch.is_grad_enabled():
            return checkpoint(self.block, *inputs, use_reentrant=False)  # [B, p, D]
        return self.block(*inputs)  # [B, p, D]

    def first(self, num_images: int) -> TrainingLayer:
        parts = (self.text, self.text_valid, self.value_scale)
        text, text_valid, value_scale = (None if part is None else part[:num_images] for part in parts)
        return replace(self, text=text, text_valid=text_valid, value_scale=value_scale)

    def scaled(self, value_scale: Tensor | None) -> TrainingLayer:
        return replace(self, value_scale=value_scale)


@dataclass(frozen=True)
class SamplingLayer:
    """rotation: of all positions, [1, K + L, d/2]; None without RoPE. text_kv: None without cross-attention.
    value_scale: [B, N], of the first slots, None: 1 throughout."""

    block: Block
    rotation: Rotation | None
    text_kv: TextKV | None
    is_compiled: bool
    value_scale: Tensor | None

    def __call__(
        self, x: Tensor, positions: Tensor | None, bias: Tensor | None, query_ids: Tensor | None = None
    ) -> Tensor:
        rotation = self.rotation if self.rotation is None or positions is None else self.rotation.at(positions)
        run = compiled(Block.run, "default") if self.is_compiled else Block.run
        return run(self.block, x, rotation, bias, self.text_kv, query_ids, self.value_scale)  # [B, p, D]

    def first(self, num_images: int) -> SamplingLayer:
        value_scale = None if self.value_scale is None else self.value_scale[:num_images]
        text_kv = None if self.text_kv is None else self.text_kv.first(num_images)
        return replace(self, text_kv=text_kv, value_scale=value_scale)

    def scaled(self, value_scale: Tensor | None) -> SamplingLayer:
        return replace(self, value_scale=value_scale)

    def watched(self, watch: AttentionWatch) -> SamplingLayer:
        """The same, with its cross-attention seen by `watch`. A compiled block shows none."""
        assert not self.is_compiled, "a compiled block shows no attention"
        return replace(self, text_kv=None if self.text_kv is None else replace(self.text_kv, watch=watch))


@dataclass(frozen=True)
class Context:
    """See the module's docstring. network: the model that runs, cast and packed as wanted; head: its head, None for
    training. decoder_bias: [B, 1, K + L, K + L] or None."""

    network: Trunk
    conditions: Conditions
    encoder: tuple[Layer, ...]
    decoder: tuple[Layer, ...]
    decoder_bias: Tensor | None
    head: HeadSampler | None = None

    def first(self, num_images: int) -> Context:
        """The same for the first images alone."""
        return replace(
            self,
            conditions=self.conditions.first(num_images),
            encoder=tuple(layer.first(num_images) for layer in self.encoder),
            decoder=tuple(layer.first(num_images) for layer in self.decoder),
            decoder_bias=None if self.decoder_bias is None else self.decoder_bias[:num_images],
        )

    def watched(self, watch: AttentionWatch) -> Context:
        """The same, for sampling, with the cross-attention of the decoder's blocks but the last seen by `watch`."""
        *others, last = cast(tuple[SamplingLayer, ...], self.decoder)
        return replace(self, decoder=(*(layer.watched(watch) for layer in others), last))


def training_layers(
    blocks: nn.ModuleList, angles: Tensor | None, conditions: Conditions, is_checkpointed: bool
) -> tuple[Layer, ...]:
    """angles: [K + L, d/2] of all positions, None without RoPE."""
    modules = cast(Iterable[Block], blocks)
    text, text_valid, scales = conditions.text, conditions.text_valid, conditions.layout_scales
    return tuple(TrainingLayer(block, angles, text, text_valid, is_checkpointed, scales) for block in modules)


def sampling_layers(
    blocks: nn.ModuleList,
    cast_blocks: nn.ModuleList,
    angles: Tensor | None,
    conditions: Conditions,
    dtype: torch.dtype,
    is_compiled: bool,
) -> tuple[Layer, ...]:
    """blocks: in float32, by which everything is computed ahead; cast_blocks: the same in `dtype`, which run."""
    pairs = zip(cast(Iterable[Block], blocks), cast(Iterable[Block], cast_blocks), strict=True)
    return tuple(
        SamplingLayer(
            cast_block,
            None if angles is None else block.attn.rotation(angles[None]),  # [1, K + L, d/2]
            _text_kv(block.cross, conditions, dtype),
            is_compiled,
            conditions.layout_scales,
        )
        for block, cast_block in pairs
    )


def _text_kv(cross: GatedCrossAttention | None, conditions: Conditions, dtype: torch.dtype) -> TextKV | None:
    if cross is None or conditions.text is None or conditions.text_valid is None:
        return None
    count = conditions.num_with_text
    null = conditions.text[count, 0] if count < len(conditions.text) else None  # [C]
    text_kv = cross.keys_values(conditions.text[:count], conditions.text_valid[:count], null)
    null = None if text_kv.null is None else text_kv.null.to(dtype)  # [D]
    return replace(text_kv, keys=text_kv.keys.to(dtype), values=text_kv.values.to(dtype), null=null)
