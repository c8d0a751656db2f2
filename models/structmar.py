"""StructMAR: masked autoregression (MAR, arXiv:2406.11838; MaskGIT, arXiv:2202.04200) given a caption and boxes.

A trunk (`trunk.py`) and a token head (`heads/`), chosen apart: continuous tokens with a diffusion head, codes with a
discrete one. Backbone parameters carry MAR's names and shapes. Everything new starts as the identity, so that a model
just built on MAR weights, given no text and no layout, computes what MAR computes.

What is hidden and drawn on its own is a token of the trunk or, in a single trunk whose patches hold several codes, a
code: "tokens" below are these.

Shape letters: B batch, L tokens, D width, T text tokens, N boxes (max), C latent channels, C' channels of a token,
m masked tokens, M diffusion_batch_mul, p tokens asked for, r rows of the head, S noisy versions of a token, Z channels
of the head's condition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.blocks import gather_tokens
from models.config import PRESETS, StructMARConfig, preset_config
from models.heads.base import LossNoise
from models.heads.build import build_diffusion_head, build_discrete_head
from models.layout import LayoutEmbedder
from models.masking import TokenMask, sample_token_mask
from models.sizes import SizeEmbedder
from models.trunk import Trunk
from util.types import LayoutBatch, SizeBatch, TextContext

__all__ = ["PRESETS", "StructMAR", "StructMARConfig", "gather_tokens", "preset_config"]


@dataclass(frozen=True)
class TrainingNoise:
    """Everything random about one training step. mask: the hidden tokens; head: what the head's loss draws."""

    mask: TokenMask
    head: LossNoise

    def to(self, device: torch.device | str) -> TrainingNoise:
        return TrainingNoise(self.mask.to(device), self.head.to(device))


class StructMAR(Trunk):
    """See the module's docstring. Latents are scaled [B, C, h, w], or codes [B, 1, h, w] as float32 whole numbers;
    captions and boxes come encoded (`util.types`)."""

    def __init__(self, config: StructMARConfig) -> None:
        super().__init__(config)
        width = config.encoder_embed_dim
        if config.num_categories:
            phrase_dim = config.text_dim if config.phrases else 0
            self.layout_embed = LayoutEmbedder(config.num_categories, width, config.layout_fourier, phrase_dim)
        if config.text_dim:
            if config.has_cross_attention(0):
                self.text_null = nn.Parameter(torch.zeros(1, 1, config.text_dim))
            self.text_pool_proj = nn.Linear(config.text_dim, width)
            nn.init.zeros_(self.text_pool_proj.weight)
            nn.init.zeros_(self.text_pool_proj.bias)
        if config.size_condition:
            self.size_embed = SizeEmbedder(width)
        if config.head == "diffusion":
            self.diffloss = build_diffusion_head(config)
        else:
            self.code_head = build_discrete_head(config)

    def fsdp_units(self) -> list[nn.Module]:
        """Modules that are sharded on their own; the caller shards the root last."""
        blocks = [*self.encoder_blocks, *self.decoder_blocks]
        return [*blocks, *self.diffloss.networks()] if self.config.head == "diffusion" else blocks

    def patchify(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, L, C * p * p], p cells of the latents along a token's side."""
        p = self.config.token_side
        patches = latents.unfold(2, p, p).unfold(3, p, p)  # [B, C, h/p, w/p, p, p]
        return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # [B, L, C * p * p]

    def unpatchify(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, L, C * p * p] of a (rows, columns) grid of the trunk's tokens -> [B, C, h, w]."""
        p, (rows, columns) = self.config.token_side, self.config.unit_grid(grid)
        x = tokens.view(-1, rows, columns, self.config.vae_embed_dim, p, p)  # [B, h/p, w/p, C, p, p]
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # [B, C, h, w]

    def grid_of(self, latents: Tensor) -> tuple[int, int]:
        """(rows, columns) of the trunk's tokens of latents [B, C, h, w]. Raises ValueError if these are no whole
        patches."""
        p, (height, width) = self.config.patch_size, latents.shape[2:]
        if height % p or width % p:
            raise ValueError(f"latents of {height} x {width} cells are no whole patches of {p} x {p}")
        return height // p, width // p

    def sample_training_noise(
        self,
        batch_size: int,
        generator: torch.Generator,
        mask_ratio_min: float,
        grid: tuple[int, int] | None = None,
        mask_schedule: str | None = None,
    ) -> TrainingNoise:
        """Everything random about one training step, on the generator's device. grid: the config's by default.
        mask_schedule: of `masking.mask_ratio`, by default the head's. A single trunk has a mask ratio per image."""
        config = self.config
        num_tokens = math.prod(config.unit_grid(grid))
        schedule, per_image = mask_schedule or config.mask_schedule, config.trunk == "single"
        mask = sample_token_mask(batch_size, num_tokens, mask_ratio_min, generator, schedule, per_image)
        num_scored = mask.num_hidden if config.loss_on == "masked" else batch_size * num_tokens
        return TrainingNoise(mask, self.head.sample_noise(config.diffusion_batch_mul * num_scored, generator))

    def forward(
        self,
        latents: Tensor,
        noise: TrainingNoise,
        labels: Tensor | None = None,
        text: TextContext | None = None,
        layout: LayoutBatch | None = None,
        sizes: SizeBatch | None = None,
    ) -> Tensor:
        """Mean loss of the scored tokens, the masked ones or all: a scalar.

        latents: [B, C, h, w] scaled; noise: of `sample_training_noise`, M rows of the head per scored token; labels:
        [B] int64, -1 for none; sizes: of the pictures, by default whole ones. Raises ValueError for noise of another
        number of tokens than the latents have.
        """
        target, z = self.scored_tokens(latents, noise, labels, text, layout, sizes)  # [r, C'], [r, Z]
        return self.head.token_loss(target, z, noise.head).mean()

    def predictions(
        self,
        latents: Tensor,
        noise: TrainingNoise,
        labels: Tensor | None = None,
        text: TextContext | None = None,
        layout: LayoutBatch | None = None,
        sizes: SizeBatch | None = None,
    ) -> Tensor:
        """What `forward` compares with the truth: the head's `prediction` of the scored tokens, M rows for each,
        [M * r, ...]. Sharded models need this method registered, as `denoise`."""
        target, z = self.scored_tokens(latents, noise, labels, text, layout, sizes)  # [r, C'], [r, Z]
        return self.head.prediction(target, z, noise.head)  # [M * r, ...]

    def scored_tokens(
        self,
        latents: Tensor,
        noise: TrainingNoise,
        labels: Tensor | None,
        text: TextContext | None,
        layout: LayoutBatch | None,
        sizes: SizeBatch | None,
    ) -> tuple[Tensor, Tensor]:
        """Those that are hidden, or all, by `config.loss_on`: clean [r, C'], and the head's condition [r, Z]. Arguments
        as of `forward`."""
        tokens = self.patchify(latents)  # [B, L, C']
        if noise.mask.masked.shape != tokens.shape[:2]:
            found, wanted = tuple(noise.mask.masked.shape), tuple(tokens.shape[:2])
            raise ValueError(f"noise is for (images, tokens) {found}, the latents have {wanted}")
        conditions = self.embed_conditions(len(tokens), labels, text, layout, self.grid_of(latents), sizes)
        z = self.predict(tokens, noise.mask.kept_ids(), self.prepare(conditions))  # [B, L, Z]

        target, z = tokens.flatten(0, 1), z.flatten(0, 1)  # [B * L, C'], [B * L, Z]
        if self.config.loss_on == "masked":
            hidden = noise.mask.hidden_rows()  # [r]
            target, z = target.index_select(0, hidden), z.index_select(0, hidden)  # [r, C'], [r, Z]
        return target, z

    def code_logits(
        self,
        tokens: Tensor,
        kept_ids: Tensor,
        token_ids: Tensor,
        labels: Tensor | None = None,
        text: TextContext | None = None,
        layout: LayoutBatch | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """What the discrete head says of chosen tokens: one pass of the backbone.

        tokens: [B, L, C'], of which kept_ids [B, n] are visible; token_ids: [B, p]; grid: the config's by default;
        returns logits of the codebook's K codes for each of a token's codes, [B, p, C', K] float32, computed in float32
        even under autocast. Sharded models need this method registered as `denoise`.
        """
        conditions = self.embed_conditions(len(tokens), labels, text, layout, grid)
        z = self.predict(tokens, kept_ids, self.prepare(conditions), token_ids)  # [B, p, Z]
        with torch.autocast(z.device.type, enabled=False):
            return self.code_head.logits(z.float())  # [B, p, C', K]

    def token_conditions(
        self,
        tokens: Tensor,
        kept_ids: Tensor,
        token_ids: Tensor,
        labels: Tensor | None = None,
        text: TextContext | None = None,
        layout: LayoutBatch | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """What the head is told of chosen tokens: one pass of the backbone, [B, p, D]. The arguments of `denoise`;
        sharded models need this method registered as that one."""
        conditions = self.embed_conditions(len(tokens), labels, text, layout, grid)
        return gather_tokens(self.predict(tokens, kept_ids, self.prepare(conditions)), token_ids)  # [B, p, D]

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
        z = self.token_conditions(tokens, kept_ids, token_ids, labels, text, layout, grid)  # [B, p, D]
        z = z[:, :, None].expand(-1, -1, noisy.shape[2], -1).flatten(0, 2)  # [B * p * S, D]
        rows, steps = noisy.flatten(0, 2), timesteps.flatten()  # [B * p * S, C'], [B * p * S]
        if full_precision_head:
            with torch.autocast(z.device.type, enabled=False):
                output = self.diffloss.net(rows, steps, z.float())  # [B * p * S, 2C']
        else:
            output = self.diffloss.net(rows, steps, z)  # [B * p * S, 2C']
        return output.unflatten(0, noisy.shape[:3])  # [B, p, S, 2C']
