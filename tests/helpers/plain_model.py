"""The backbone and the head written out from the formulas: the readable reference for `StructMAR.predict`.

Nothing of the forward pass is shared with `models/`: only weights, config and embedded conditions are read. Every pass
computes everything, for every token. Shape letters as in `models/structmar.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from models.conditioning import Conditions
from models.config import StructMARConfig
from models.structmar import StructMAR

Weights = Mapping[str, Tensor]


def plain_predict(model: StructMAR, tokens: Tensor, kept_ids: Tensor, conditions: Conditions) -> Tensor:
    """The head's condition of every token: tokens [B, L, C'] of which kept_ids [B, n] are visible -> [B, L, D]."""
    config, weights = model.config, dict(model.named_parameters())
    num_slots, num_images = config.buffer_size, len(tokens)
    rows = torch.arange(num_images, device=tokens.device)[:, None]  # [B, 1]
    position = weights["encoder_pos_embed_learned"]  # [1, K + L, D]
    if not config.learned_pos:  # zeros then, of any grid's length
        position = position.new_zeros(1, num_slots + math.prod(conditions.grid), position.shape[2])

    buffer = conditions.base[:, None].repeat(1, num_slots, 1)  # [B, K, D]
    if conditions.layout_tokens is not None:
        num_boxes = conditions.layout_tokens.shape[1]
        buffer = torch.cat([buffer[:, :num_boxes] + conditions.layout_tokens, buffer[:, num_boxes:]], 1)  # [B, K, D]
    visible = _linear(weights, "z_proj", tokens[rows, kept_ids])  # [B, n, D]
    visible = visible + position[0, num_slots:][kept_ids].to(visible.dtype)  # [B, n, D]
    x = torch.cat([(buffer + position[:, :num_slots]).to(visible.dtype), visible], 1)  # [B, K + n, D]
    x = _norm(weights, "z_proj_ln", x)
    bias = _bias(config, conditions, kept_ids) if config.layout_bias_encoder else None
    for number in range(config.encoder_depth):
        x = _block(config, weights, "encoder", number, x, kept_ids, bias, conditions)  # [B, K + n, D]
    x = _linear(weights, "decoder_embed", _norm(weights, "encoder_norm", x))  # [B, K + n, D]

    num_tokens = math.prod(conditions.grid)
    every = torch.arange(num_tokens, device=tokens.device).expand(num_images, -1)  # [B, L]
    image = weights["mask_token"].to(x.dtype).repeat(num_images, num_tokens, 1)  # [B, L, D]
    image[rows, kept_ids] = x[:, num_slots:]
    x = torch.cat([x[:, :num_slots], image], 1)  # [B, K + L, D]
    x = x + weights["decoder_pos_embed_learned"] if config.learned_pos else x.float()  # [B, K + L, D]
    bias = _bias(config, conditions, every) if config.layout_bias_decoder else None
    for number in range(config.decoder_depth):
        x = _block(config, weights, "decoder", number, x, every, bias, conditions)  # [B, K + L, D]
    x = _norm(weights, "decoder_norm", x)[:, num_slots:]  # [B, L, D]
    return x + weights["diffusion_pos_embed_learned"] if config.learned_pos else x  # [B, L, D]


def plain_head(model: StructMAR, x: Tensor, timesteps: Tensor, z: Tensor) -> Tensor:
    """The head's network. x: [r, C]; timesteps: [r]; z: [r, D]; returns [r, 2C]: eps and the variance fraction."""
    weights = {name.removeprefix("diffloss.net."): weight for name, weight in model.named_parameters()}
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=x.device) / 128)  # [128]
    angles = timesteps[:, None].float() * frequencies  # [r, 128]
    embedded = _linear(weights, "time_embed.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))  # [r, W]
    embedded = _linear(weights, "time_embed.mlp.2", F.silu(embedded))  # [r, W]
    condition = F.silu(embedded + _linear(weights, "cond_embed", z))  # [r, W]
    x = _linear(weights, "input_proj", x)  # [r, W]
    for number in range(model.config.diffloss_d):
        name = f"res_blocks.{number}"
        shift, scale, gate = _linear(weights, f"{name}.adaLN_modulation.1", condition).chunk(3, -1)  # each [r, W]
        hidden = _norm(weights, f"{name}.in_ln", x) * (1 + scale) + shift  # [r, W]
        hidden = _linear(weights, f"{name}.mlp.2", F.silu(_linear(weights, f"{name}.mlp.0", hidden)))  # [r, W]
        x = x + gate * hidden  # [r, W]
    shift, scale = _linear(weights, "final_layer.adaLN_modulation.1", condition).chunk(2, -1)  # each [r, W]
    hidden = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift  # [r, W]
    return _linear(weights, "final_layer.linear", hidden)  # [r, 2C]


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)


def _bias(config: StructMARConfig, conditions: Conditions, ids: Tensor) -> Tensor | None:
    """What is added to the logits among buffer and the image tokens `ids` [B, n]: [B, 1, K + n, K + n]."""
    if conditions.layout_bias is None:
        return None
    length = config.buffer_size + ids.shape[1]
    bias = torch.zeros(len(ids), 1, length, length, device=ids.device)  # [B, 1, K + n, K + n]
    for image, chosen in enumerate(ids):
        values = conditions.layout_bias[image, chosen]  # [n, N]
        bias[image, 0, config.buffer_size :, : values.shape[1]] = values
    return bias


def _rotated(config: StructMARConfig, weights: Weights, name: str, x: Tensor, ids: Tensor, columns: int) -> Tensor:
    """x: [B, H, K + n, d], of which the last n stand at positions `ids` [B, n] of rows of so many columns."""
    if config.rope_mode == "off":
        return x
    half = x.shape[-1] // 2
    frequencies = 10000 ** (-2 * torch.arange(half // 2, device=x.device) / half)  # [d/4]
    turns = torch.cat([(ids % columns)[..., None] * frequencies, (ids // columns)[..., None] * frequencies], -1)
    if config.rope_mode == "gated":
        turns = turns * weights[f"{name}.rope_strength"]  # [B, n, d/2]
    turns = F.pad(turns, (0, 0, config.buffer_size, 0))[:, None]  # [B, 1, K + n, d/2]
    even, odd = x.float()[..., 0::2], x.float()[..., 1::2]  # each [B, H, K + n, d/2]
    turned = torch.stack([even * turns.cos() - odd * turns.sin(), even * turns.sin() + odd * turns.cos()], -1)
    return turned.flatten(-2).to(x.dtype)  # [B, H, K + n, d]


def _heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # [B, H, n, d]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    mask = mask.to(q.dtype) if mask is not None and mask.dtype != torch.bool else mask
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)  # [B, n, D]


def _attend_scaled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scales: Tensor) -> Tensor:
    """Probabilities towards the first N tokens times scales [B, N], not normalised again."""
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # [B, H, n, m]
    weights = (logits if mask is None else logits + mask).softmax(-1)  # [B, H, n, m]
    factors = F.pad(scales, (0, weights.shape[-1] - scales.shape[1]), value=1.0)  # [B, m]
    return (weights * factors[:, None, None] @ v).transpose(1, 2).flatten(2)  # [B, n, D]


def _block(
    config: StructMARConfig,
    weights: Weights,
    part: str,
    number: int,
    x: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    conditions: Conditions,
) -> Tensor:
    name = f"{part}_blocks.{number}"
    num_heads = config.encoder_num_heads if part == "encoder" else config.decoder_num_heads
    qkv = _linear(weights, f"{name}.attn.qkv", _norm(weights, f"{name}.norm1", x))  # [B, K + n, 3D]
    q, k, v = (_heads(each, num_heads) for each in qkv.chunk(3, -1))  # each [B, H, K + n, d]
    q, k = (
        _rotated(config, weights, f"{name}.attn", each, ids, conditions.grid[1]) for each in (q, k)
    )  # [B, H, K + n, d]
    seen = _attend(q, k, v, bias)  # [B, K + n, D]
    if conditions.layout_scales is not None:
        seen = _attend_scaled(q, k, v, bias, conditions.layout_scales)  # [B, K + n, D]
    x = x + _linear(weights, f"{name}.attn.proj", seen)  # [B, K + n, D]
    if config.has_cross_attention(number):
        assert conditions.text is not None and conditions.text_valid is not None
        q = _heads(_linear(weights, f"{name}.cross.q", _norm(weights, f"{name}.cross.norm", x)), num_heads)
        k, v = (_heads(each, num_heads) for each in _linear(weights, f"{name}.cross.kv", conditions.text).chunk(2, -1))
        seen = _attend(q, k, v, conditions.text_valid[:, None, None, :])  # [B, K + n, D]
        x = x + weights[f"{name}.cross.gate"].tanh() * _linear(weights, f"{name}.cross.proj", seen)  # [B, K + n, D]
    hidden = F.gelu(_linear(weights, f"{name}.mlp.fc1", _norm(weights, f"{name}.norm2", x)))  # [B, K + n, 4D]
    return x + _linear(weights, f"{name}.mlp.fc2", hidden)  # [B, K + n, D]
