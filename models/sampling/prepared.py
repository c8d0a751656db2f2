"""The backbone for sampling: what does not change between iterations is computed once, what nobody reads is left out.

`predict_tokens` equals `StructMAR.predict` at the tokens that an iteration uncovers (up to float rounding). Computed
once per sampling run: keys and values of the captions in every layer, the cross-attention of the rows without a caption
(a constant), the rotations of all positions, the decoder's attention bias. Left out: in the last decoder block, all but
the tokens asked for, which need no more of the others than their keys and values.

In bfloat16, weights are cast once per run: autocast would cast them at every call. Float32 stay: the backbone's
residual stream and norms, what is computed once, the way into the head and out of it, and a second head for the first
reverse step, where rounding costs most (`models/heads/diffusion.py`). A compiled model (`StructMAR.compile_mode`) is
sampled with compiled blocks and a compiled head.

Shape letters: B rows (images of all guidance branches), L image tokens, K buffer slots, D width, n visible tokens,
p tokens asked for, T text tokens, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from models.blocks import Block, GatedCrossAttention, TextMemory, gather_tokens
from models.conditioning import Conditions
from models.heads.diffloss import SimpleMLPAdaLN
from models.heads.packed import can_pack, pack
from models.rope import Rotation, with_buffer
from models.structmar import StructMAR


@dataclass(frozen=True)
class PreparedBlock:
    """rotation: of all K + L positions, [1, K + L, d/2]; None without RoPE. memory: None without cross-attention."""

    block: Block
    rotation: Rotation | None
    memory: TextMemory | None
    is_compiled: bool

    def run(self, x: Tensor, rotation: Rotation | None, bias: Tensor | None, query_ids: Tensor | None = None) -> Tensor:
        """`Block.run`; rotation: at the positions of x."""
        function = compiled(Block.run, "default") if self.is_compiled else Block.run
        return function(self.block, x, rotation, bias, self.memory, query_ids)


@dataclass(frozen=True)
class Head:
    """first: the network of the first reverse step, in float32. net: of all others. compile_mode: None for eager."""

    first: SimpleMLPAdaLN
    net: SimpleMLPAdaLN
    compile_mode: str | None = None

    def output(self, step: int, x: Tensor, modulations: Sequence[Tensor]) -> Tensor:
        """Of a reverse step (0: the first). x: [r, C]; modulations: [G, r, .] per layer; gives [G, r, 2C] float32."""
        net = self.first if step == 0 else self.net
        if self.compile_mode is None:
            return net.modulated(x, modulations)  # [G, r, 2C]
        return compiled(SimpleMLPAdaLN.modulated, self.compile_mode)(net, x, modulations)  # [G, r, 2C]


@lru_cache
def compiled(function: Callable[..., Tensor], mode: str) -> Callable[..., Any]:
    """One for all layers and all numbers of tokens."""
    return torch.compile(function, mode=mode, dynamic=True)


@dataclass(frozen=True)
class Prepared:
    """Built by `prepare`, for one model and one set of conditions. decoder_bias: [B, 1, K + L, K + L] or None."""

    model: StructMAR
    head: Head
    conditions: Conditions
    encoder: tuple[PreparedBlock, ...]
    decoder: tuple[PreparedBlock, ...]
    decoder_bias: Tensor | None

    def first(self, num_images: int) -> Prepared:
        """The same for the first images alone."""

        def blocks(parts: tuple[PreparedBlock, ...]) -> tuple[PreparedBlock, ...]:
            memories = (None if part.memory is None else part.memory.first(num_images) for part in parts)
            return tuple(replace(part, memory=memory) for part, memory in zip(parts, memories, strict=True))

        return replace(
            self,
            conditions=self.conditions.first(num_images),
            encoder=blocks(self.encoder),
            decoder=blocks(self.decoder),
            decoder_bias=None if self.decoder_bias is None else self.decoder_bias[:num_images],
        )


def prepare(
    model: StructMAR, conditions: Conditions, num_with_text: int, dtype: torch.dtype = torch.float32
) -> Prepared:
    """conditions: of B rows, of which those from `num_with_text` on have no caption, that is, only the null token."""
    cast_model = for_sampling(model, dtype)

    def blocks(modules: nn.ModuleList, cast_modules: nn.ModuleList, angles: Tensor) -> tuple[PreparedBlock, ...]:
        table = with_buffer(angles, model.config.buffer_size)[None]  # [1, K + L, d/2]
        pairs = zip(cast(Iterable[Block], modules), cast(Iterable[Block], cast_modules), strict=True)
        return tuple(
            PreparedBlock(
                cast_block,
                block.attn.rotation(table) if model.config.rope_mode != "off" else None,
                _text_memory(block.cross, conditions, num_with_text, dtype),
                model.compile_mode is not None,
            )
            for block, cast_block in pairs
        )

    encoder = blocks(model.encoder_blocks, cast_model.encoder_blocks, model.rope_angles_encoder)
    decoder = blocks(model.decoder_blocks, cast_model.decoder_blocks, model.rope_angles_decoder)
    head = Head(model.diffloss.net, cast_model.diffloss.net, model.compile_mode)
    if conditions.layout_bias is not None:
        conditions = replace(conditions, layout_bias=conditions.layout_bias.to(dtype))
    return Prepared(cast_model, head, conditions, encoder, decoder, model.decoder_bias(conditions))


def for_sampling(model: StructMAR, dtype: torch.dtype) -> StructMAR:
    """The float32 model, or a copy that shares all weights but those that are cast or packed (`heads/packed.py`).

    Cast are the linears of the backbone's blocks, and the head's blocks and adaLN.
    """
    packs = model.compile_mode is None and can_pack(model.config.diffloss_w, dtype, model.fake_latent.device)
    if dtype == torch.float32 and not packs:
        return model
    with torch.device("meta"):
        copy = StructMAR(model.config).eval()  # not `copy.deepcopy`, which sharded models refuse
    copy.load_state_dict({name: weight.detach() for name, weight in model.named_parameters()}, assign=True)
    for name, buffer in model.named_buffers():  # none of them is persistent
        owner, _, leaf = name.rpartition(".")
        copy.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
    if dtype != torch.float32:
        for part in (copy.encoder_blocks, copy.decoder_blocks, copy.decoder_embed):
            for linear in (module for module in part.modules() if isinstance(module, nn.Linear)):
                _cast(linear, dtype)
                linear.register_forward_pre_hook(_cast_input)
        _cast(copy.diffloss.net.res_blocks, dtype)
        _cast(copy.diffloss.net.final_layer.adaLN_modulation, dtype)
    if packs:
        pack(copy.diffloss.net)
    return copy


def _cast(root: nn.Module, dtype: torch.dtype) -> None:
    """Not `Module.to`, which would change the parameters in place."""
    for module in root.modules():
        for name, weight in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(weight.detach().to(dtype), requires_grad=False))


def _cast_input(linear: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    return inputs[0].to(cast(nn.Linear, linear).weight.dtype)


def _text_memory(
    cross: GatedCrossAttention | None, conditions: Conditions, num_with_text: int, dtype: torch.dtype
) -> TextMemory | None:
    if cross is None or conditions.text is None or conditions.text_valid is None:
        return None
    null = conditions.text[num_with_text, 0] if num_with_text < len(conditions.text) else None  # [C]
    memory = cross.read(conditions.text[:num_with_text], conditions.text_valid[:num_with_text], null)
    null = None if memory.null is None else memory.null.to(dtype)  # [D]
    return replace(memory, keys=memory.keys.to(dtype), values=memory.values.to(dtype), null=null)


def predict_tokens(prepared: Prepared, tokens: Tensor, kept_ids: Tensor, token_ids: Tensor) -> Tensor:
    """tokens [B, L, C'] of which kept_ids [B, n] are visible -> the head's condition of token_ids [B, p]: [B, p, D]."""
    model = prepared.model
    num_slots = model.config.buffer_size
    slots = torch.arange(num_slots, device=kept_ids.device).expand(len(kept_ids), -1)  # [B, K]
    positions = torch.cat([slots, kept_ids + num_slots], dim=1)  # [B, K + n]
    x = model.encoder_input(tokens, kept_ids, prepared.conditions)  # [B, K + n, D]
    bias = model.encoder_bias(kept_ids, prepared.conditions)  # [B, 1, K + n, K + n]
    for part in prepared.encoder:
        rotation = None if part.rotation is None else part.rotation.at(positions)
        x = part.run(x, rotation, bias)  # [B, K + n, D]

    x = model.decoder_input(model.encoder_norm(x), kept_ids)  # [B, K + L, D]
    *others, last = prepared.decoder
    for part in others:
        x = part.run(x, part.rotation, prepared.decoder_bias)  # [B, K + L, D]
    x = last.run(x, last.rotation, prepared.decoder_bias, token_ids + num_slots)  # [B, p, D]
    position = model.diffusion_pos_embed_learned.expand(len(x), -1, -1)  # [B, L, D]
    return model.decoder_norm(x) + gather_tokens(position, token_ids)  # [B, p, D]
