"""StructMAR: masked autoregression over continuous tokens (MAR, arXiv:2406.11838), conditioned on a caption and boxes.

Backbone parameters carry MAR's names and shapes. Everything new starts as the identity, so that a model just built on
MAR weights, given no text and no layout, computes what MAR computes.

Shape letters: B batch, L image tokens, K buffer slots, D width, T text tokens, N boxes (max), C latent channels,
n visible tokens, m masked tokens, M diffusion_batch_mul, p tokens asked for, S noisy versions of a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from models.blocks import Block, LayerNorm, gather_tokens
from models.condition_embedder import ConditionEmbedder
from models.conditioning import Conditions
from models.config import PRESETS, StructMARConfig, preset_config
from models.context import Context, sampling_layers, training_layers
from models.heads.base import LossNoise, TokenHead
from models.heads.diffloss import DiffLoss
from models.inference import inference_copy
from models.layout import LayoutEmbedder, attention_bias
from models.masking import TokenMask, sample_token_mask
from models.rope import rope_angles_2d, with_buffer
from util.types import LayoutBatch, TextContext

__all__ = ["PRESETS", "StructMAR", "StructMARConfig", "gather_tokens", "preset_config"]


@dataclass(frozen=True)
class TrainingNoise:
    """Everything random about one training step. mask: the hidden tokens; head: what the head's loss draws."""

    mask: TokenMask
    head: LossNoise

    def to(self, device: torch.device | str) -> TrainingNoise:
        return TrainingNoise(self.mask.to(device), self.head.to(device))


class StructMAR(ConditionEmbedder):
    """See the module's docstring. Latents are scaled [B, C, h, w]; captions and boxes come encoded (`util.types`).

    compile_mode: `torch.compile`'s for the head while sampling (the blocks' is the default); None: nothing is compiled.
    """

    rope_angles_encoder: Tensor
    rope_angles_decoder: Tensor

    def __init__(self, config: StructMARConfig) -> None:
        super().__init__()
        self.config = config
        self.compile_mode: str | None = None
        width, decoder_width = config.encoder_embed_dim, config.decoder_embed_dim
        length = config.num_tokens + config.buffer_size

        self.class_emb = nn.Embedding(config.class_num, width)
        self.fake_latent = nn.Parameter(torch.zeros(1, width))
        self.z_proj = DiffLoss.embedding(config.token_dim, width)
        self.z_proj_ln = LayerNorm(width)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, width))
        self.encoder_blocks = self._blocks(width, config.encoder_depth, config.encoder_num_heads)
        self.encoder_norm = LayerNorm(width)

        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, decoder_width))
        self.decoder_blocks = self._blocks(decoder_width, config.decoder_depth, config.decoder_num_heads)
        self.decoder_norm = LayerNorm(decoder_width)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, config.num_tokens, decoder_width))
        self._initialize()

        if config.num_categories:
            self.layout_embed = LayoutEmbedder(config.num_categories, width, config.layout_fourier)
        if config.text_dim:
            if config.has_cross_attention(0):
                self.text_null = nn.Parameter(torch.zeros(1, 1, config.text_dim))
            self.text_pool_proj = nn.Linear(config.text_dim, width)
            nn.init.zeros_(self.text_pool_proj.weight)
            nn.init.zeros_(self.text_pool_proj.bias)
        self.diffloss = DiffLoss(
            config.token_dim, decoder_width, config.diffloss_w, config.diffloss_d, config.grad_checkpointing
        )
        self._register_rope()

    def _blocks(self, width: int, depth: int, num_heads: int) -> nn.ModuleList:
        config = self.config
        text_dims = [config.text_dim if config.has_cross_attention(index) else 0 for index in range(depth)]
        return nn.ModuleList(
            Block(
                width,
                num_heads,
                config.mlp_ratio,
                config.attn_dropout,
                config.proj_dropout,
                config.rope_mode,
                text_dim,
            )
            for text_dim in text_dims
        )

    def _initialize(self) -> None:
        """MAR's: Xavier for linears, 0.02 for tokens and positions."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        positions = [self.encoder_pos_embed_learned, self.decoder_pos_embed_learned, self.diffusion_pos_embed_learned]
        for parameter in (self.class_emb.weight, self.fake_latent, self.mask_token, *positions):
            nn.init.normal_(parameter, std=0.02)
        if not self.config.learned_pos:
            for parameter in positions:
                nn.init.zeros_(parameter)
                parameter.requires_grad_(False)

    def _register_rope(self) -> None:
        config = self.config
        for part in ("encoder", "decoder"):
            head_dim = getattr(config, f"{part}_embed_dim") // getattr(config, f"{part}_num_heads")
            enabled = config.rope_mode != "off"
            angles = rope_angles_2d(config.grid, head_dim) if enabled else torch.zeros(config.num_tokens, 0)
            self.register_buffer(f"rope_angles_{part}", angles, persistent=False)  # [L, d/2]

    @torch.no_grad()
    def set_rope_strength(self, value: float) -> None:
        """Sets every learnable strength: 0 keeps MAR's attention, 1 is the full rotation. Only for rope_mode gated."""
        for block in (*self.encoder_blocks, *self.decoder_blocks):
            block.attn.rope_strength.fill_(value)

    def fsdp_units(self) -> list[nn.Module]:
        """Modules that are sharded on their own; the caller shards the root last."""
        return [*self.encoder_blocks, *self.decoder_blocks, self.diffloss.net]

    @property
    def head(self) -> TokenHead:
        """What knows the tokens; its parameters carry MAR's name, `diffloss`."""
        return self.diffloss

    def patchify(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, L, C * p * p]."""
        p = self.config.patch_size
        patches = latents.unfold(2, p, p).unfold(3, p, p)  # [B, C, h/p, w/p, p, p]
        return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # [B, L, C * p * p]

    def unpatchify(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, L, C * p * p] of a (rows, columns) grid -> [B, C, h, w]."""
        p, (rows, columns) = self.config.patch_size, grid
        x = tokens.view(-1, rows, columns, self.config.vae_embed_dim, p, p)  # [B, h/p, w/p, C, p, p]
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # [B, C, h, w]

    def grid_of(self, latents: Tensor) -> tuple[int, int]:
        """(rows, columns) of the tokens of latents [B, C, h, w]. Raises ValueError if these are no whole patches."""
        p, (height, width) = self.config.patch_size, latents.shape[2:]
        if height % p or width % p:
            raise ValueError(f"latents of {height} x {width} cells are no whole patches of {p} x {p}")
        return height // p, width // p

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
        if conditions.layout_bias is not None:
            conditions = replace(conditions, layout_bias=conditions.layout_bias.to(dtype))
        head = self.head.sampler(network.head, self.compile_mode) if before is None else before.head
        return Context(network, conditions, encoder, decoder, self.decoder_bias(conditions), head)

    def _rope_angles(self, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
        """Of buffer and image tokens in encoder and decoder: [K + L, d/2] each, None without RoPE."""
        if self.config.rope_mode == "off":
            return None, None
        tables = [self.rope_angles_encoder, self.rope_angles_decoder]  # [L, d/2] each
        if grid != self.config.grid:
            tables = [rope_angles_2d(grid, 2 * table.shape[1]).to(table.device) for table in tables]
        encoder, decoder = (with_buffer(table, self.config.buffer_size) for table in tables)  # [K + L, d/2] each
        return encoder, decoder

    def predict(self, tokens: Tensor, kept_ids: Tensor, context: Context, token_ids: Tensor | None = None) -> Tensor:
        """The pass over the backbone, the same one in training, sampling and scoring.

        tokens: [B, L, C'], of which kept_ids [B, n] are visible; context: of `prepare`; token_ids: [B, p], the tokens
        asked for (None: all, in order). Returns the head's condition of these: [B, p, D].
        """
        if context.network is not self:
            return context.network.predict(tokens, kept_ids, context, token_ids)  # [B, p, D]
        return self.decode(self.encode(tokens, kept_ids, context), kept_ids, context, token_ids)  # [B, p, D]

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
        buffer = conditions.base[:, None].expand(-1, config.buffer_size, -1)  # [B, K, D]
        if conditions.layout_tokens is not None:
            num_slots = conditions.layout_tokens.shape[1]
            with_layout = buffer[:, :num_slots] + conditions.layout_tokens  # [B, N, D]
            buffer = torch.cat([with_layout, buffer[:, num_slots:]], dim=1)  # [B, K, D]
        visible = self.z_proj(gather_tokens(tokens, kept_ids))  # [B, n, D]
        if config.learned_pos:
            position = self.encoder_pos_embed_learned  # [1, K + L, D]
            image_position = position[:, config.buffer_size :].expand(len(tokens), -1, -1)  # [B, L, D]
            visible = visible + gather_tokens(image_position, kept_ids).to(visible.dtype)  # [B, n, D]
            buffer = buffer + position[:, : config.buffer_size]  # [B, K, D]
        x = torch.cat([buffer.to(visible.dtype), visible], dim=1)  # [B, K + n, D]
        return self.z_proj_ln(x)  # [B, K + n, D]

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
        config = self.config
        query_ids = None if token_ids is None else token_ids + config.buffer_size  # [B, p]
        x = self.decoder_input(encoded, kept_ids, context.conditions)  # [B, K + L, D]
        *others, last = context.decoder
        for layer in others:
            x = layer(x, None, context.decoder_bias)  # [B, K + L, D]
        x = self.decoder_norm(last(x, None, context.decoder_bias, query_ids))  # [B, K + L or p, D]
        x = x if token_ids is not None else x[:, config.buffer_size :]  # [B, p, D]
        if not config.learned_pos:
            return x  # [B, p, D]
        position: Tensor = self.diffusion_pos_embed_learned  # [1, L, D]
        if token_ids is not None:
            position = gather_tokens(position.expand(len(x), -1, -1), token_ids)  # [B, p, D]
        return x + position  # [B, p, D]

    def decoder_input(self, encoded: Tensor, kept_ids: Tensor, conditions: Conditions) -> Tensor:
        """The buffer and all tokens, hidden ones as the mask token: [B, K + L, D]."""
        config, num_tokens = self.config, math.prod(conditions.grid)
        x = self.decoder_embed(encoded)  # [B, K + n, D]
        buffer, visible = x[:, : config.buffer_size], x[:, config.buffer_size :]  # [B, K, D], [B, n, D]
        image = self.mask_token.to(x.dtype).expand(len(x), num_tokens, -1)  # [B, L, D]
        image = image.scatter(1, kept_ids[..., None].expand(-1, -1, x.shape[-1]), visible)  # [B, L, D]
        x = torch.cat([buffer, image], dim=1).to(self.mask_token.dtype)  # [B, K + L, D], the residual stream: float32
        return x + self.decoder_pos_embed_learned if config.learned_pos else x  # [B, K + L, D]

    def sample_training_noise(
        self,
        batch_size: int,
        generator: torch.Generator,
        mask_ratio_min: float,
        grid: tuple[int, int] | None = None,
    ) -> TrainingNoise:
        """Everything random about one training step, on the generator's device. grid: the config's by default."""
        mask = sample_token_mask(batch_size, math.prod(grid or self.config.grid), mask_ratio_min, generator)
        num_rows = self.config.diffusion_batch_mul * batch_size * mask.num_masked
        return TrainingNoise(mask, self.head.sample_noise(num_rows, generator))

    def forward(
        self,
        latents: Tensor,
        noise: TrainingNoise,
        labels: Tensor | None = None,
        text: TextContext | None = None,
        layout: LayoutBatch | None = None,
    ) -> Tensor:
        """Mean loss of the masked tokens: a scalar.

        latents: [B, C, h, w] scaled; noise: of `sample_training_noise`, M rows of the head per masked token; labels:
        [B] int64, -1 for none. Raises ValueError for noise of another number of tokens than the latents have.
        """
        tokens = self.patchify(latents)  # [B, L, C']
        if noise.mask.masked.shape != tokens.shape[:2]:
            found, wanted = tuple(noise.mask.masked.shape), tuple(tokens.shape[:2])
            raise ValueError(f"noise is for (images, tokens) {found}, the latents have {wanted}")
        conditions = self.embed_conditions(len(tokens), labels, text, layout, self.grid_of(latents))
        z = self.predict(tokens, noise.mask.kept_ids(), self.prepare(conditions))  # [B, L, D]

        masked_ids = noise.mask.masked_ids()  # [B, m]
        target = gather_tokens(tokens, masked_ids).flatten(0, 1)  # [B * m, C']
        z = gather_tokens(z, masked_ids).flatten(0, 1)  # [B * m, D]
        return self.head.token_loss(target, z, noise.head).mean()

    def denoise(
        self,
        tokens: Tensor,
        kept_ids: Tensor,
        token_ids: Tensor,
        noisy: Tensor,
        timesteps: Tensor,
        labels: Tensor | None = None,
        text: TextContext | None = None,
        layout: LayoutBatch | None = None,
        grid: tuple[int, int] | None = None,
        full_precision_head: bool = False,
    ) -> Tensor:
        """What the head says of chosen tokens at chosen noise levels: one pass of the backbone, p * S rows of the head.

        tokens: [B, L, C'], of which kept_ids [B, n] are visible; token_ids: [B, p]; noisy: [B, p, S, C'], versions of
        those tokens; timesteps: [B, p, S] int64; grid: the config's by default; returns [B, p, S, 2C']: eps and the
        variance fraction.
        full_precision_head: the head runs in float32 even under autocast. Sharded models (FSDP) run their hooks only in
        `forward`; `torch.distributed.fsdp.register_fsdp_forward_method(model, "denoise")` adds this method.
        """
        conditions = self.embed_conditions(len(tokens), labels, text, layout, grid)
        z = gather_tokens(self.predict(tokens, kept_ids, self.prepare(conditions)), token_ids)  # [B, p, D]
        z = z[:, :, None].expand(-1, -1, noisy.shape[2], -1).flatten(0, 2)  # [B * p * S, D]
        rows, steps = noisy.flatten(0, 2), timesteps.flatten()  # [B * p * S, C'], [B * p * S]
        if full_precision_head:
            with torch.autocast(z.device.type, enabled=False):
                output = self.diffloss.net(rows, steps, z.float())  # [B * p * S, 2C']
        else:
            output = self.diffloss.net(rows, steps, z)  # [B * p * S, 2C']
        return output.unflatten(0, noisy.shape[:3])  # [B, p, S, 2C']
