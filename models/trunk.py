"""The trunk: from visible tokens and conditions to one vector z per token, by one of two roads.

`mae` is MAR's (arXiv:2406.11838): an encoder of the buffer and the visible tokens, a decoder of the buffer and all
tokens. `single` is the decoder alone: buffer and all tokens, hidden ones as the mask token (MaskGIT, arXiv:2202.04200).
Where single codes are hidden but several make a token of the trunk, a token of which some are known is embedded with
the others as a learned row, and its vector is split into one per code behind the last block.

Parameters carry MAR's names and shapes. Those beyond MAR's start as the identity.

Shape letters: B batch, L image tokens, U units (what is hidden and drawn on its own: tokens, or their codes), K buffer
slots, D width, N boxes (max), C' channels of a unit, n visible units, p units asked for, s codes along a token's side,
Z channels of the head's condition.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from models.blocks import Block, gather_tokens
from models.condition_embedder import ConditionEmbedder
from models.conditioning import Conditions
from models.config import StructMARConfig
from models.context import Context, sampling_layers, training_layers
from models.heads.base import TokenHead
from models.heads.build import build_embedding
from models.heads.diffloss import DiffLoss
from models.heads.discrete import DiscreteHead
from models.inference import inference_copy
from models.layout import attention_bias
from models.norms import build_norm
from models.rope import fit_scale, rope_angles_2d, with_buffer
from models.units import group_units, owners_of, ungroup_units

INIT_STD = 0.02


class Trunk(ConditionEmbedder):
    """See the module's docstring. Layout and text parts and the head are made by `StructMAR`.

    compile_mode: `torch.compile`'s for the head while sampling (the blocks' is the default); None: nothing is compiled.
    """

    diffloss: DiffLoss
    code_head: DiscreteHead
    rope_angles_encoder: Tensor
    rope_angles_decoder: Tensor

    def __init__(self, config: StructMARConfig) -> None:
        super().__init__()
        self.config = config
        self.compile_mode: str | None = None
        self.class_emb = nn.Embedding(config.class_num, config.encoder_embed_dim)
        self.fake_latent = nn.Parameter(torch.zeros(1, config.encoder_embed_dim))
        self.z_proj = build_embedding(config)
        if config.trunk == "mae":
            self._make_mae()
        else:
            self._make_single()
        self._initialize()
        self._register_rope()

    @property
    def head(self) -> TokenHead:
        """What knows the tokens. Its parameters are `diffloss`, MAR's name, or `code_head`."""
        return self.diffloss if self.config.head == "diffusion" else self.code_head

    def _make_mae(self) -> None:
        config, width, decoder_width = self.config, self.config.encoder_embed_dim, self.config.decoder_embed_dim
        length = config.num_tokens + config.buffer_size
        self.z_proj_ln = build_norm(config.norm, width)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, width))
        self.encoder_blocks = self._blocks(width, config.encoder_depth, config.encoder_num_heads)
        self.encoder_norm = build_norm(config.norm, width)
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, decoder_width))
        self.decoder_blocks = self._blocks(decoder_width, config.decoder_depth, config.decoder_num_heads)
        self.decoder_norm = build_norm(config.norm, decoder_width)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, config.num_tokens, decoder_width))

    def _make_single(self) -> None:
        config, width = self.config, self.config.decoder_embed_dim
        self.encoder_blocks = nn.ModuleList()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        if config.learned_pos:
            self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, config.num_tokens + config.buffer_size, width))
        self.decoder_blocks = self._blocks(width, config.decoder_depth, config.decoder_num_heads)
        self.decoder_norm = build_norm(config.norm, width)

    def _blocks(self, width: int, depth: int, num_heads: int) -> nn.ModuleList:
        config = self.config
        text_dims = [config.text_dim if config.has_cross_attention(index) else 0 for index in range(depth)]
        return nn.ModuleList(Block(config, width, num_heads, text_dim) for text_dim in text_dims)

    def _initialize(self) -> None:
        """Linears: Xavier in an MAE trunk, as MAR; 0.02 in a single one, as MaskGIL. Tokens and positions: 0.02."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if self.config.trunk == "mae":
                    nn.init.xavier_uniform_(module.weight)
                else:
                    nn.init.normal_(module.weight, std=INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        own = dict(self.named_parameters(recurse=False))
        positions = [parameter for name, parameter in own.items() if name.endswith("pos_embed_learned")]
        for parameter in (self.class_emb.weight, self.fake_latent, self.mask_token, *positions):
            nn.init.normal_(parameter, std=INIT_STD)
        if not self.config.learned_pos:
            for parameter in positions:
                nn.init.zeros_(parameter)
                parameter.requires_grad_(False)

    def _register_rope(self) -> None:
        config = self.config
        for part in ("encoder", "decoder"):
            head_dim = getattr(config, f"{part}_embed_dim") // getattr(config, f"{part}_num_heads")
            angles = torch.zeros(config.num_tokens, 0)  # [L, 0]
            if config.rope_mode != "off":
                angles = rope_angles_2d(config.grid, head_dim, axes=config.rope_axes)  # [L, d/2]
            self.register_buffer(f"rope_angles_{part}", angles, persistent=False)  # [L, d/2]

    @torch.no_grad()
    def set_rope_strength(self, value: float) -> None:
        """Sets every learnable strength: 0 keeps MAR's attention, 1 is the full rotation. Only for rope_mode gated."""
        for block in (*self.encoder_blocks, *self.decoder_blocks):
            block.attn.rope_strength.fill_(value)

    def set_rope_scale(self, value: str) -> None:
        """How positions of grids that are not the config's are counted from now on, of `config.ROPE_SCALES`."""
        self.config = replace(self.config, rope_scale=value)

    def prepare(
        self, conditions: Conditions, dtype: torch.dtype | None = None, before: Context | None = None
    ) -> Context:
        """What every pass over the backbone shares (`models/context.py`).

        dtype: None for training, where gradients flow; for sampling that of weights and matrix products, float32 or
        bfloat16. Then everything that does not depend on the tokens is computed here, once. before: a context of other
        conditions, whose cast weights are used again.
        """
        angles = self._rope_angles(conditions.grid)
        if dtype is None:
            is_checkpointed = self.config.grad_checkpointing
            encoder = training_layers(self.encoder_blocks, angles[0], conditions, is_checkpointed)
            decoder = training_layers(self.decoder_blocks, angles[1], conditions, is_checkpointed)
            return Context(self, conditions, encoder, decoder, self.decoder_bias(conditions))
        network = inference_copy(self, dtype) if before is None else before.network
        options = (conditions, dtype, self.compile_mode is not None)
        encoder = sampling_layers(self.encoder_blocks, network.encoder_blocks, angles[0], *options)
        decoder = sampling_layers(self.decoder_blocks, network.decoder_blocks, angles[1], *options)
        head = self.head.sampler(network.head, self.compile_mode) if before is None else before.head
        context = Context(network, conditions, encoder, decoder, None, head)
        return self.prepare_layout(conditions, dtype, context)

    def prepare_layout(self, conditions: Conditions, dtype: torch.dtype, before: Context) -> Context:
        """The same as `prepare` with a dtype, where these conditions have the text of the context before, row by row:
        its keys and values are used again."""
        if conditions.layout_bias is not None:
            conditions = replace(conditions, layout_bias=conditions.layout_bias.to(dtype))
        encoder, decoder = (
            tuple(layer.scaled(conditions.layout_scales) for layer in layers)
            for layers in (before.encoder, before.decoder)
        )
        bias = self.decoder_bias(conditions)  # [B, 1, K + L, K + L]
        return replace(before, conditions=conditions, encoder=encoder, decoder=decoder, decoder_bias=bias)

    def _rope_angles(self, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
        """Of buffer and image tokens in encoder and decoder: [K + L, d/2] each, None without RoPE."""
        if self.config.rope_mode == "off":
            return None, None
        tables = [self.rope_angles_encoder, self.rope_angles_decoder]  # [L, d/2] each
        if grid != self.config.grid:
            axes, is_fitted = self.config.rope_axes, self.config.rope_scale == "fit"
            scale = fit_scale(grid, self.config.grid) if is_fitted else 1.0
            angles = [rope_angles_2d(grid, 2 * table.shape[1], axes=axes, scale=scale) for table in tables]
            tables = [each.to(table.device) for each, table in zip(angles, tables, strict=True)]  # [L, d/2] each
        encoder, decoder = (with_buffer(table, self.config.buffer_size) for table in tables)  # [K + L, d/2] each
        return encoder, decoder

    def predict(self, tokens: Tensor, kept_ids: Tensor, context: Context, token_ids: Tensor | None = None) -> Tensor:
        """The pass over the backbone, the same one in training, sampling and scoring.

        tokens: [B, U, C'], of which kept_ids [B, n] are visible (in a single trunk, U stands for none, so that rows may
        show different numbers); context: of `prepare`; token_ids: [B, p], the units asked for (None: all, in order).
        Returns the head's condition of these: [B, p, Z].
        """
        if context.network is not self:
            return context.network.predict(tokens, kept_ids, context, token_ids)  # [B, p, Z]
        if self.config.trunk == "single":
            return self.predict_single(tokens, kept_ids, context, token_ids)  # [B, p, Z]
        return self.decode(self.encode(tokens, kept_ids, context), kept_ids, context, token_ids)  # [B, p, Z]

    def encode(self, tokens: Tensor, kept_ids: Tensor, context: Context) -> Tensor:
        """tokens: [B, L, C']; kept_ids: [B, n], the visible ones; returns [B, K + n, D]."""
        num_slots = self.config.buffer_size
        x = self.encoder_input(tokens, kept_ids, context.conditions)  # [B, K + n, D]
        slots = torch.arange(num_slots, device=kept_ids.device).expand(len(kept_ids), -1)  # [B, K]
        positions = torch.cat([slots, kept_ids + num_slots], dim=1)  # [B, K + n]
        bias = self.encoder_bias(kept_ids, context.conditions)  # [B, 1, K + n, K + n]
        for layer in context.encoder:
            x = layer(x, positions, bias)  # [B, K + n, D]
        return self.encoder_norm(x)  # [B, K + n, D]

    def encoder_input(self, tokens: Tensor, kept_ids: Tensor, conditions: Conditions) -> Tensor:
        """The buffer and the visible tokens, embedded: [B, K + n, D]."""
        config = self.config
        buffer = self.buffer(conditions)  # [B, K, D]
        visible = self.z_proj(gather_tokens(tokens, kept_ids))  # [B, n, D]
        if config.learned_pos:
            position = self.encoder_pos_embed_learned  # [1, K + L, D]
            image_position = position[:, config.buffer_size :].expand(len(tokens), -1, -1)  # [B, L, D]
            visible = visible + gather_tokens(image_position, kept_ids).to(visible.dtype)  # [B, n, D]
            buffer = buffer + position[:, : config.buffer_size]  # [B, K, D]
        x = torch.cat([buffer.to(visible.dtype), visible], dim=1)  # [B, K + n, D]
        return self.z_proj_ln(x)  # [B, K + n, D]

    def buffer(self, conditions: Conditions) -> Tensor:
        """The slots in front of the image tokens: the base condition, the first ones with a layout token. [B, K, D]."""
        buffer = conditions.base[:, None].expand(-1, self.config.buffer_size, -1)  # [B, K, D]
        if conditions.layout_tokens is None:
            return buffer
        num_slots = conditions.layout_tokens.shape[1]
        with_layout = buffer[:, :num_slots] + conditions.layout_tokens  # [B, N, D]
        return torch.cat([with_layout, buffer[:, num_slots:]], dim=1)  # [B, K, D]

    def encoder_bias(self, kept_ids: Tensor, conditions: Conditions) -> Tensor | None:
        """What the layout adds to the attention logits among buffer and visible tokens: [B, 1, K + n, K + n]."""
        if conditions.layout_bias is None or not self.config.layout_bias_encoder:
            return None
        return attention_bias(gather_tokens(conditions.layout_bias, kept_ids), self.config.buffer_size)

    def decoder_bias(self, conditions: Conditions) -> Tensor | None:
        """What the layout adds to the attention logits among buffer and all tokens: [B, 1, K + L, K + L]."""
        if conditions.layout_bias is None or not self.config.layout_bias_decoder:
            return None
        return attention_bias(conditions.layout_bias, self.config.buffer_size)

    def decode(self, encoded: Tensor, kept_ids: Tensor, context: Context, token_ids: Tensor | None = None) -> Tensor:
        """encoded: [B, K + n, D]; returns the head's condition of token_ids [B, p] (None: of all), [B, p, D]."""
        x = self.run_decoder(self.decoder_input(encoded, kept_ids, context.conditions), context, token_ids)  # [B, p, D]
        if not self.config.learned_pos:
            return x  # [B, p, D]
        position: Tensor = self.diffusion_pos_embed_learned  # [1, L, D]
        if token_ids is not None:
            position = gather_tokens(position.expand(len(x), -1, -1), token_ids)  # [B, p, D]
        return x + position  # [B, p, D]

    def run_decoder(self, x: Tensor, context: Context, token_ids: Tensor | None) -> Tensor:
        """x: [B, K + L, D]; returns tokens token_ids [B, p] (None: all) behind the last block and norm, [B, p, D]."""
        num_slots = self.config.buffer_size
        query_ids = None if token_ids is None else token_ids + num_slots  # [B, p]
        *others, last = context.decoder
        for layer in others:
            x = layer(x, None, context.decoder_bias)  # [B, K + L, D]
        x = self.decoder_norm(last(x, None, context.decoder_bias, query_ids))  # [B, K + L or p, D]
        return x if token_ids is not None else x[:, num_slots:]  # [B, p, D]

    def decoder_input(self, encoded: Tensor, kept_ids: Tensor, conditions: Conditions) -> Tensor:
        """The buffer and all tokens, hidden ones as the mask token: [B, K + L, D]."""
        config, num_tokens = self.config, math.prod(conditions.grid)
        x = self.decoder_embed(encoded)  # [B, K + n, D]
        buffer, visible = x[:, : config.buffer_size], x[:, config.buffer_size :]  # [B, K, D], [B, n, D]
        image = self.mask_token.to(x.dtype).expand(len(x), num_tokens, -1)  # [B, L, D]
        image = image.scatter(1, kept_ids[..., None].expand(-1, -1, x.shape[-1]), visible)  # [B, L, D]
        x = torch.cat([buffer, image], dim=1).to(self.mask_token.dtype)  # [B, K + L, D], the residual stream: float32
        return x + self.decoder_pos_embed_learned if config.learned_pos else x  # [B, K + L, D]

    def predict_single(
        self, tokens: Tensor, kept_ids: Tensor, context: Context, token_ids: Tensor | None = None
    ) -> Tensor:
        """`predict` of a single trunk. Of several codes of one token, the last block computes the token alone."""
        grid = context.conditions.grid
        x = self.single_input(tokens, kept_ids, context.conditions)  # [B, K + L, D]
        if self.config.codes_per_token == 1:
            return self.run_decoder(x, context, token_ids)  # [B, p, Z]
        side = self.config.patch_size
        if token_ids is None or token_ids.shape[1] >= math.prod(grid):
            z = ungroup_units(self.code_head.split(self.run_decoder(x, context, None)), grid, side)  # [B, U, Z]
            return z if token_ids is None else gather_tokens(z, token_ids)  # [B, p, Z]
        owners, places = owners_of(token_ids, grid, side)  # each [B, p]
        z = self.code_head.split(self.run_decoder(x, context, owners))  # [B, p, s * s, Z]
        return z.gather(2, places[..., None, None].expand(-1, -1, 1, z.shape[-1])).squeeze(2)  # [B, p, Z]

    def single_input(self, tokens: Tensor, kept_ids: Tensor, conditions: Conditions) -> Tensor:
        """The buffer and all tokens, those without a visible unit as the mask token: [B, K + L, D]."""
        batch_size, num_units = tokens.shape[:2]
        visible = torch.zeros(batch_size, num_units + 1, dtype=torch.bool, device=tokens.device)  # [B, U + 1]
        visible = visible.scatter(1, kept_ids, True)[:, :num_units]  # [B, U]
        if self.config.codes_per_token == 1:
            image = self.z_proj(tokens)  # [B, L, D]
        else:
            grid, side = conditions.grid, self.config.patch_size
            codes, known = (group_units(part, grid, side) for part in (tokens[..., 0], visible))  # each [B, L, s * s]
            image, visible = self.z_proj(codes, known), known.any(-1)  # [B, L, D], [B, L]
        image = torch.where(visible[..., None], image, self.mask_token.to(image.dtype))  # [B, L, D]
        buffer = self.buffer(conditions).to(image.dtype)  # [B, K, D]
        x = torch.cat([buffer, image], dim=1).to(self.mask_token.dtype)  # [B, K + L, D], the residual stream: float32
        return x + self.decoder_pos_embed_learned if self.config.learned_pos else x  # [B, K + L, D]
