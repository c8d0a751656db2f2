"""Passes through a language model with visual experts: segment by segment on a cache, or all segments at once.

A sequence is a list of segments, each of one modality and as long in every row of the batch; padded positions are
marked. By segments, every pass is of one modality: text is computed with the shapes of the language model alone, so
its states are bit-equal to those. One mixed pass gives the same up to rounding, and is what gradient checkpointing
needs, which drops caches.

What comes before the first visual segment depends on nothing that trains, and is computed without gradients.

Shape letters: B batch, t positions of a segment, T of all segments, k of all that was read, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from models.mars.masks import NO_BLOCK, attention_mask, with_bias
from models.semvie import TEXT, Modality, mixed_route, require_room


@dataclass(frozen=True)
class Segment:
    """embeddings: [B, t, D] in the language model's dtype; valid: [B, t] bool, None: all are; is_block: its positions
    see each other both ways. Raises ValueError for parts that do not fit."""

    embeddings: Tensor
    modality: Modality
    valid: Tensor | None = None
    is_block: bool = False

    def __post_init__(self) -> None:
        if self.embeddings.dim() != 3:
            raise ValueError(f"embeddings must be [B, t, D], got {tuple(self.embeddings.shape)}")
        shape = tuple(self.embeddings.shape[:2])
        if self.valid is not None and (tuple(self.valid.shape) != shape or self.valid.dtype != torch.bool):
            raise ValueError(
                f"valid must be bool of {shape} as the embeddings, got {self.valid.dtype} of {tuple(self.valid.shape)}"
            )

    def __len__(self) -> int:
        return self.embeddings.shape[1]


class Context:
    """What a decoder has read so far of a batch of sequences, and reads on."""

    def __init__(self, decoder: Any) -> None:
        """decoder: of a language model with visual experts."""
        self.decoder = decoder
        self.cache = DynamicCache(config=decoder.config)
        self.lengths: list[int] = []
        self._valid: Tensor | None = None

    @property
    def length(self) -> int:
        """k"""
        return sum(self.lengths)

    def read(self, segment: Segment, bias: Tensor | None = None) -> Tensor:
        """One pass over the segment, which attends to all that was read before. bias: [B or 1, 1, t, k], added to the
        logits of attention. Gives the states after the final norm, [B, t, D].

        Raises ValueError in training with gradient checkpointing, which drops caches, and as `require_room`.
        """
        if self.decoder.training and self.decoder.is_activation_checkpointing:
            raise ValueError("gradient checkpointing drops the cache that passes by segments need: take the mixed pass")
        if not len(segment):  # as of words, where there are none before an image
            self.lengths.append(0)
            return segment.embeddings  # [B, 0, D]
        length = self.length + len(segment)
        require_room(self.decoder, length)
        valid = _joined(self._valid, self.length, segment)  # [B, k] or None
        blocks = [NO_BLOCK] * self.length + [0 if segment.is_block else NO_BLOCK] * len(segment)
        arguments = _attention_arguments(valid, blocks, segment.embeddings, bias)
        output = self.decoder(
            inputs_embeds=segment.embeddings,
            past_key_values=self.cache,
            use_cache=True,
            route=segment.modality,
            **arguments,
        )
        self._valid = valid
        self.lengths.append(len(segment))
        return output.last_hidden_state  # [B, t, D]

    def drop_last(self) -> None:
        """Forgets the segment that was read last."""
        length = self.lengths.pop()
        self.cache.crop(-length)
        if self._valid is not None:
            self._valid = self._valid[:, : self.length]  # [B, k]


def read_by_segments(decoder: Any, segments: Sequence[Segment]) -> list[Tensor]:
    """The states of each segment after the final norm, [B, t, D] each: one pass a segment."""
    context = Context(decoder)
    states, is_trained = [], False
    for segment in segments:
        is_trained |= segment.modality is not TEXT
        with torch.set_grad_enabled(is_trained and torch.is_grad_enabled()):
            states.append(context.read(segment))  # [B, t, D]
    return states


def read_mixed(decoder: Any, segments: Sequence[Segment], bias: Tensor | None = None) -> list[Tensor]:
    """The same in one pass over all segments. bias: [B or 1, 1, T, T], added to the logits of attention."""
    embeddings = torch.cat([segment.embeddings for segment in segments], dim=1)  # [B, T, D]
    require_room(decoder, embeddings.shape[1])
    lengths = [len(segment) for segment in segments]
    valid: Tensor | None = None
    blocks: list[int] = []
    for number, segment in enumerate(segments):
        valid = _joined(valid, len(blocks), segment)  # [B, k] or None
        blocks += [number if segment.is_block else NO_BLOCK] * len(segment)
    modalities = [(segment.modality, len(segment)) for segment in segments]
    output = decoder(
        inputs_embeds=embeddings,
        use_cache=False,
        route=mixed_route(len(embeddings), modalities, embeddings.device),
        **_attention_arguments(valid, blocks, embeddings, bias),
    )
    return list(output.last_hidden_state.split(lengths, dim=1))  # [B, t, D] each


def _joined(valid: Tensor | None, length: int, segment: Segment) -> Tensor | None:
    """Which positions are no padding, after `length` that were read before: [B, k] bool; None: all are."""
    if valid is None and segment.valid is None:
        return None
    shape, device = segment.embeddings.shape, segment.embeddings.device
    if valid is None:
        valid = torch.ones(shape[0], length, dtype=torch.bool, device=device)  # [B, k - t]
    new = segment.valid
    if new is None:
        new = torch.ones(shape[:2], dtype=torch.bool, device=device)  # [B, t]
    return torch.cat([valid, new], dim=1)  # [B, k]


def _attention_arguments(
    valid: Tensor | None, blocks: Sequence[int], embeddings: Tensor, bias: Tensor | None
) -> dict[str, Tensor]:
    """The decoder's `attention_mask` and `position_ids` where the last q of the positions look. Causal passes over
    whole rows have neither, so that they are the language model's own.

    valid: [B, k] bool; blocks: k numbers; embeddings: [B, q, D]; bias: [B or 1, 1, q, k].
    """
    num_queries = embeddings.shape[1]
    has_blocks = any(number != NO_BLOCK for number in blocks)
    if valid is None and not has_blocks and bias is None:
        return {}
    if valid is None:
        valid = torch.ones(len(embeddings), len(blocks), dtype=torch.bool, device=embeddings.device)  # [B, k]
    positions = (valid.cumsum(1) - 1).clamp(min=0)[:, -num_queries:]  # [B, q]
    if bias is None and not has_blocks:
        mask = valid[:, None, None] if num_queries == 1 else valid  # [B, 1, 1, k] or [B, k]
        return {"attention_mask": mask, "position_ids": positions}
    mask = attention_mask(valid, torch.tensor(blocks, device=valid.device), num_queries)  # [B, 1, q, k]
    if bias is not None:
        mask = with_bias(mask, bias, embeddings.dtype)  # [B, 1, q, k]
    return {"attention_mask": mask, "position_ids": positions}
