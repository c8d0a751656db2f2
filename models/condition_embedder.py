"""Embeds what images are conditioned on: a class label or a caption and boxes, and sizes, for a grid of tokens.

A base class of `StructMAR`, since the parameters lie at the model's root: their names are MAR's.

Shape letters: B batch, L image tokens, D width, T text tokens, N boxes (max), C text channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.conditioning import Conditions
from models.config import StructMARConfig
from models.layout import LayoutEmbedder, layout_bias
from models.sizes import SizeEmbedder, are_named, pixels_of_grid
from util.types import LayoutBatch, SizeBatch, TextContext


class ConditionEmbedder(nn.Module):
    """Its parameters are made by the subclass; text and layout parts only where the config has them."""

    config: StructMARConfig
    class_emb: nn.Embedding
    fake_latent: nn.Parameter
    layout_embed: LayoutEmbedder
    text_null: nn.Parameter
    text_pool_proj: nn.Linear
    size_embed: SizeEmbedder

    def embed_conditions(
        self,
        batch_size: int,
        labels: Tensor | None = None,
        text: TextContext | None = None,
        layout: LayoutBatch | None = None,
        grid: tuple[int, int] | None = None,
        sizes: SizeBatch | None = None,
    ) -> Conditions:
        """Embeds what the images are conditioned on; None means dropped for all. labels: [B] int64, -1 for none. grid:
        (rows, columns) of the image tokens, the config's by default. sizes: by default those of whole pictures of this
        grid; they are for models with `size_condition`.

        Raises ValueError if text or layout is given to a model that was built without that part, or for another grid
        than the config's with learned positions.
        """
        grid = self.config.grid if grid is None else grid
        self.config.check_grid(grid)
        base = self.fake_latent.expand(batch_size, -1)  # [B, D]
        if labels is not None:
            named = self.class_emb(labels.clamp(min=0))  # [B, D]
            base = torch.where((labels >= 0)[:, None], named, base)  # [B, D]
        if text is not None:
            base = base + self._project_pooled(text)  # [B, D]
        if self.config.size_condition:
            given = [None if part is None else part.valid for part in (text, layout)]  # [B, T], [B, N]
            given += [None if labels is None else labels[:, None] >= 0]  # [B, 1]
            named = are_named(batch_size, base.device, *given)  # [B, 1]
            base = base + self._embed_sizes(batch_size, grid, sizes) * named  # [B, D]
        context, valid = self._text_with_null(batch_size, text)  # [B, T, C], [B, T]
        tokens, bias = self._layout_parts(batch_size, layout, grid)  # [B, N, D], [B, L, N]
        scales = None if layout is None else layout.own_scales()  # [B, N]
        return Conditions(base, tokens, bias, context, valid, 0 if text is None else batch_size, grid, scales)

    def _embed_sizes(self, batch_size: int, grid: tuple[int, int], sizes: SizeBatch | None) -> Tensor:
        """What sizes add to the base condition: [B, D]. An image without any other condition has none: without sizes
        too, it is what guidance leads away from."""
        if sizes is None:
            height, width = pixels_of_grid(grid, self.config.vae_stride * self.config.patch_size)
            sizes = SizeBatch.whole(batch_size, height, width, self.fake_latent.device)
        embedded: Tensor = self.size_embed(sizes)  # [B, D]
        return embedded

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

    def _layout_parts(
        self, batch_size: int, layout: LayoutBatch | None, grid: tuple[int, int]
    ) -> tuple[Tensor | None, Tensor | None]:
        if not self.config.num_categories:
            if layout is not None:
                raise ValueError("a layout was given, but the model was built with num_categories=0")
            return None, None
        if layout is None:
            return self.layout_embed.null_tokens(batch_size, self.config.max_objects), None
        if layout.valid.shape[1] != self.config.max_objects:
            raise ValueError(f"layout has {layout.valid.shape[1]} slots, the model {self.config.max_objects}")
        bias = layout_bias(layout, grid, self.config.layout_bias_value)  # [B, L, N]
        return self.layout_embed(layout), bias
