"""StructMAR: masked autoregression over continuous tokens (MAR, arXiv:2406.11838), conditioned on a caption and boxes.

Backbone parameters carry MAR's names and shapes. Everything new starts as the identity, so that a model just built on
MAR weights, given no text and no layout, computes what MAR computes.

Shape letters: B batch, L image tokens, K buffer slots, D width, T text tokens, N boxes (max), C latent channels,
n visible tokens, m masked tokens, M diffusion_batch_mul, p tokens to denoise, S draws (noisy versions) of a token.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.blocks import Block, LayerNorm, gather_tokens
from models.conditioning import Conditions
from models.config import PRESETS, StructMARConfig, preset_config
from models.heads.diffloss import DiffLoss, DiffusionDraws, sample_draws
from models.layout import LayoutEmbedder, attention_bias, layout_bias
from models.masking import TokenMask, sample_token_mask
from models.rope import rope_angles_2d, with_buffer
from util.types import LayoutBatch, TextContext

__all__ = ["PRESETS", "StructMAR", "StructMARConfig", "gather_tokens", "preset_config"]


class StructMAR(nn.Module):
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
        self.z_proj = nn.Linear(config.token_dim, width)
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

    def patchify(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, L, C * p * p]."""
        p = self.config.patch_size
        patches = latents.unfold(2, p, p).unfold(3, p, p)  # [B, C, h/p, w/p, p, p]
        return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # [B, L, C * p * p]

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """[B, L, C * p * p] -> [B, C, h, w]."""
        p, (rows, columns) = self.config.patch_size, self.config.grid
        x = tokens.view(-1, rows, columns, self.config.vae_embed_dim, p, p)  # [B, h/p, w/p, C, p, p]
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # [B, C, h, w]

    def embed_conditions(
        self,
        batch_size: int,
        labels: Tensor | None = None,
        text: TextContext | None = None,
        layout: LayoutBatch | None = None,
    ) -> Conditions:
        """Embeds what the images are conditioned on; None means dropped for all. labels: [B] int64, -1 for none.

        Raises ValueError if text or layout is given to a model that was built without that part.
        """
        base = self.fake_latent.expand(batch_size, -1)  # [B, D]
        if labels is not None:
            named = self.class_emb(labels.clamp(min=0))  # [B, D]
            base = torch.where((labels >= 0)[:, None], named, base)  # [B, D]
        if text is not None:
            base = base + self._project_pooled(text)  # [B, D]
        context, valid = self._text_with_null(batch_size, text)  # [B, T, C], [B, T]
        tokens, bias = self._layout_parts(batch_size, layout)  # [B, N, D], [B, L, N]
        return Conditions(base, tokens, bias, context, valid)

    def _project_pooled(self, text: TextContext) -> Tensor:
        if not self.config.text_dim:
            raise ValueError("text was given, but the model was built with text_dim=0")
        if text.tokens.shape[-1] != self.config.text_dim:
            raise ValueError(
                f"text has {text.tokens.shape[-1]} channels, the model's text_dim is {self.config.text_dim}"
            )
        present = text.valid.any(dim=1, keepdim=True)  # [B, 1]
        return self.text_pool_proj(text.pooled) * present  # [B, D]

    def _text_with_null(self, batch_size: int, text: TextContext | None) -> tuple[Tensor | None, Tensor | None]:
        """Puts the learned null token in front; it is valid exactly where an image has no text. Without any
        cross-attention there is no context."""
        if not self.config.has_cross_attention(0):
            return None, None
        null = self.text_null.expand(batch_size, -1, -1)  # [B, 1, C]
        if text is None:
            return null, torch.ones(batch_size, 1, dtype=torch.bool, device=null.device)
        absent = ~text.valid.any(dim=1, keepdim=True)  # [B, 1]
        return torch.cat([null.to(text.tokens.dtype), text.tokens], 1), torch.cat([absent, text.valid], 1)

    def _layout_parts(self, batch_size: int, layout: LayoutBatch | None) -> tuple[Tensor | None, Tensor | None]:
        if not self.config.num_categories:
            if layout is not None:
                raise ValueError("a layout was given, but the model was built with num_categories=0")
            return None, None
        if layout is None:
            return self.layout_embed.null_tokens(batch_size, self.config.max_objects), None
        if layout.valid.shape[1] != self.config.max_objects:
            raise ValueError(f"layout has {layout.valid.shape[1]} slots, the model {self.config.max_objects}")
        bias = layout_bias(layout, self.config.grid, self.config.layout_bias_value)  # [B, L, N]
        return self.layout_embed(layout), bias

    def encode(self, tokens: Tensor, kept_ids: Tensor, conditions: Conditions) -> Tensor:
        """tokens: [B, L, C']; kept_ids: [B, n], the visible ones; returns [B, K + n, D]."""
        x = self.encoder_input(tokens, kept_ids, conditions)  # [B, K + n, D]
        angles = self.rope_angles_encoder[kept_ids]  # [B, n, d/2]
        bias = self.encoder_bias(kept_ids, conditions)  # [B, 1, K + n, K + n]
        return self.encoder_norm(self._run(self.encoder_blocks, x, angles, bias, conditions))  # [B, K + n, D]

    def encoder_input(self, tokens: Tensor, kept_ids: Tensor, conditions: Conditions) -> Tensor:
        """The buffer and the visible tokens, embedded: [B, K + n, D]."""
        config = self.config
        buffer = conditions.base[:, None].expand(-1, config.buffer_size, -1)  # [B, K, D]
        if conditions.layout_tokens is not None:
            num_slots = conditions.layout_tokens.shape[1]
            with_layout = buffer[:, :num_slots] + conditions.layout_tokens  # [B, N, D]
            buffer = torch.cat([with_layout, buffer[:, num_slots:]], dim=1)  # [B, K, D]
        visible = self.z_proj(gather_tokens(tokens, kept_ids))  # [B, n, D]
        position = self.encoder_pos_embed_learned
        kept_position = gather_tokens(
            position[:, config.buffer_size :].expand(len(tokens), -1, -1), kept_ids
        )  # [B, n, D]
        buffer = buffer + position[:, : config.buffer_size]  # [B, K, D]
        x = torch.cat([buffer.to(visible.dtype), visible + kept_position.to(visible.dtype)], dim=1)  # [B, K + n, D]
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

    def decode(self, encoded: Tensor, kept_ids: Tensor, conditions: Conditions) -> Tensor:
        """encoded: [B, K + n, D]; returns the head's condition for every token, [B, L, D]."""
        x = self.decoder_input(encoded, kept_ids)  # [B, K + L, D]
        angles = self.rope_angles_decoder[None]  # [1, L, d/2]
        x = self._run(self.decoder_blocks, x, angles, self.decoder_bias(conditions), conditions)  # [B, K + L, D]
        return self.decoder_norm(x)[:, self.config.buffer_size :] + self.diffusion_pos_embed_learned  # [B, L, D]

    def decoder_input(self, encoded: Tensor, kept_ids: Tensor) -> Tensor:
        """The buffer and all tokens, hidden ones as the mask token: [B, K + L, D]."""
        config = self.config
        x = self.decoder_embed(encoded)  # [B, K + n, D]
        buffer, visible = x[:, : config.buffer_size], x[:, config.buffer_size :]  # [B, K, D], [B, n, D]
        image = self.mask_token.to(x.dtype).expand(len(x), config.num_tokens, -1)  # [B, L, D]
        image = image.scatter(1, kept_ids[..., None].expand(-1, -1, x.shape[-1]), visible)  # [B, L, D]
        return torch.cat([buffer, image], dim=1) + self.decoder_pos_embed_learned  # [B, K + L, D]

    def _run(
        self, blocks: Iterable[nn.Module], x: Tensor, angles: Tensor, bias: Tensor | None, conditions: Conditions
    ) -> Tensor:
        rotation = (
            with_buffer(angles, self.config.buffer_size) if self.config.rope_mode != "off" else None
        )  # [., K+n, d/2]
        for block in blocks:
            inputs = (x, rotation, bias, conditions.text, conditions.text_valid)
            if self.config.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, use_reentrant=False)  # [B, K + n, D]
            else:
                x = block(*inputs)  # [B, K + n, D]
        return x

    def predict(self, tokens: Tensor, kept_ids: Tensor, conditions: Conditions) -> Tensor:
        """The backbone: tokens [B, L, C'] of which kept_ids [B, n] are visible -> the head's condition [B, L, D]."""
        return self.decode(self.encode(tokens, kept_ids, conditions), kept_ids, conditions)

    def sample_training_draws(
        self, batch_size: int, generator: torch.Generator, mask_ratio_min: float
    ) -> tuple[TokenMask, DiffusionDraws]:
        """Everything random about one training step, on the generator's device."""
        mask = sample_token_mask(batch_size, self.config.num_tokens, mask_ratio_min, generator)
        num_rows = self.config.diffusion_batch_mul * batch_size * mask.num_masked
        return mask, sample_draws(num_rows, self.config.token_dim, generator)

    def forward(
        self,
        latents: Tensor,
        mask: TokenMask,
        draws: DiffusionDraws,
        labels: Tensor | None = None,
        text: TextContext | None = None,
        layout: LayoutBatch | None = None,
    ) -> Tensor:
        """Mean diffusion loss of the masked tokens: a scalar.

        latents: [B, C, h, w] scaled; draws: one timestep and noise per row, M copies of all masked tokens in turn
        ([M * B * m]); labels: [B] int64, -1 for none.
        """
        tokens = self.patchify(latents)  # [B, L, C']
        conditions = self.embed_conditions(len(tokens), labels, text, layout)
        z = self.predict(tokens, mask.kept_ids(), conditions)  # [B, L, D]

        masked_ids = mask.masked_ids()  # [B, m]
        target = gather_tokens(tokens, masked_ids).flatten(0, 1)  # [B * m, C']
        z = gather_tokens(z, masked_ids).flatten(0, 1)  # [B * m, D]
        return self.diffloss.token_loss(target, z, draws).mean()

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
        full_precision_head: bool = False,
    ) -> Tensor:
        """What the head says of chosen tokens at chosen noise levels: one pass of the backbone, p * S rows of the head.

        tokens: [B, L, C'], of which kept_ids [B, n] are visible; token_ids: [B, p]; noisy: [B, p, S, C'], versions of
        those tokens; timesteps: [B, p, S] int64; returns [B, p, S, 2C']: eps and the variance fraction.
        full_precision_head: the head runs in float32 even under autocast. Sharded models (FSDP) run their hooks only in
        `forward`; `torch.distributed.fsdp.register_fsdp_forward_method(model, "denoise")` adds this method.
        """
        conditions = self.embed_conditions(len(tokens), labels, text, layout)
        z = gather_tokens(self.predict(tokens, kept_ids, conditions), token_ids)  # [B, p, D]
        z = z[:, :, None].expand(-1, -1, noisy.shape[2], -1).flatten(0, 2)  # [B * p * S, D]
        rows, steps = noisy.flatten(0, 2), timesteps.flatten()  # [B * p * S, C'], [B * p * S]
        if full_precision_head:
            with torch.autocast(z.device.type, enabled=False):
                output = self.diffloss.net(rows, steps, z.float())  # [B * p * S, 2C']
        else:
            output = self.diffloss.net(rows, steps, z)  # [B * p * S, 2C']
        return output.unflatten(0, noisy.shape[:3])  # [B, p, S, 2C']
