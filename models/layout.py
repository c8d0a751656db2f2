"""Layout tokens and the layout attention bias.

Token of a box: `E_class[c] + MLP(Fourier(box))`, added to the base condition token in one of the buffer slots
(Fourier features of the box as GLIGEN's, arXiv:2301.07093). With phrases: `+ W p`, p the phrase's pooled states, and a
learned row in place of E_class[c] where a box has no class; W and the row start at zero. Bias M of
`softmax(Q K^T / sqrt(d) + M)`: an image token may look at a layout token only from inside its box.

Shape letters: B batch, N boxes (max), L image tokens, K buffer slots, D width, C text channels, n image tokens given.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from util.types import UNKNOWN, LayoutBatch

NUM_FREQUENCIES = 8
FREQUENCY_BASE = 100.0


def fourier_features(boxes_xyxy: Tensor) -> Tensor:
    """sin and cos of the four coordinates at 8 frequencies, 100^(i/8). [..., 4] -> [..., 64]."""
    steps = torch.arange(NUM_FREQUENCIES, dtype=torch.float32, device=boxes_xyxy.device) / NUM_FREQUENCIES  # [8]
    angles = boxes_xyxy[..., None] * FREQUENCY_BASE**steps  # [..., 4, 8]
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)  # [..., 64]


class LayoutEmbedder(nn.Module):
    """Boxes to layout tokens. Slots without a box get a learned null, which starts at zero. phrase_dim: channels of the
    boxes' phrases; 0: boxes have none."""

    def __init__(self, num_categories: int, width: int, fourier: bool = True, phrase_dim: int = 0) -> None:
        super().__init__()
        self.fourier = fourier
        self.class_emb = nn.Embedding(num_categories, width)
        box_dim = 4 * 2 * NUM_FREQUENCIES if fourier else 4
        output = nn.Linear(width, width)
        self.box_mlp = nn.Sequential(nn.Linear(box_dim, width), nn.SiLU(), output)
        self.null = nn.Parameter(torch.zeros(width))
        self.phrase_dim = phrase_dim
        if phrase_dim:
            self.unknown = nn.Parameter(torch.zeros(width))
            self.phrase = nn.Parameter(torch.zeros(width, phrase_dim))
        nn.init.normal_(self.class_emb.weight, std=0.02)
        nn.init.zeros_(output.weight)
        nn.init.zeros_(output.bias)

    def forward(self, layout: LayoutBatch) -> Tensor:
        """Returns layout tokens [B, N, D]. Raises ValueError for phrases that the model does not know, or of other
        channels."""
        features = fourier_features(layout.boxes_xyxy) if self.fourier else layout.boxes_xyxy  # [B, N, 64 or 4]
        tokens = self._names(layout) + self.box_mlp(features)  # [B, N, D]
        return torch.where(layout.valid[..., None], tokens, self.null.to(tokens.dtype))  # [B, N, D]

    def _names(self, layout: LayoutBatch) -> Tensor:
        """What boxes hold, by class, phrase or both: [B, N, D]."""
        if not self.phrase_dim:
            if layout.phrases is not None:
                raise ValueError("boxes with phrases were given, but the model was built with phrases=False")
            classes: Tensor = self.class_emb(layout.categories)  # [B, N, D]
            return classes
        phrases = layout.phrases
        if phrases is None:  # the same path: processes that train together need the same parameters in every step
            phrases = self.phrase.new_zeros(*layout.valid.shape, self.phrase_dim)  # [B, N, C]
        if phrases.shape[-1] != self.phrase_dim:
            raise ValueError(f"phrases have {phrases.shape[-1]} channels, the model's text_dim is {self.phrase_dim}")
        is_unknown = layout.categories == UNKNOWN  # [B, N]
        classes = self.class_emb(layout.categories.clamp(min=0))  # [B, N, D]
        classes = torch.where(is_unknown[..., None], self.unknown, classes)  # [B, N, D]
        return classes + functional.linear(phrases.to(self.phrase.dtype), self.phrase)  # [B, N, D]

    def null_tokens(self, batch_size: int, num_slots: int) -> Tensor:
        """What a batch without any layout gets: [B, N, D]."""
        return self.null.expand(batch_size, num_slots, -1)  # [B, N, D]


def cells_inside(boxes_xyxy: Tensor, grid: tuple[int, int]) -> Tensor:
    """Whether each cell of an (h, w) grid belongs to each box. boxes_xyxy: [B, N, 4]; returns [B, L, N] bool.

    A cell belongs to a box that holds its centre. A box too small to hold any centre owns the cell that its own centre
    falls into.
    """
    height, width = grid
    centre_x = (torch.arange(width, device=boxes_xyxy.device) + 0.5) / width  # [w]
    centre_y = (torch.arange(height, device=boxes_xyxy.device) + 0.5) / height  # [h]
    x0, y0, x1, y1 = (side[..., None] for side in boxes_xyxy.unbind(-1))  # each [B, N, 1]
    in_columns = (centre_x >= x0) & (centre_x <= x1)  # [B, N, w]
    in_rows = (centre_y >= y0) & (centre_y <= y1)  # [B, N, h]
    inside = (in_rows[..., :, None] & in_columns[..., None, :]).flatten(-2)  # [B, N, L]

    column = ((x0 + x1) / 2 * width).long().clamp(0, width - 1)  # [B, N, 1]
    row = ((y0 + y1) / 2 * height).long().clamp(0, height - 1)  # [B, N, 1]
    own_cell = torch.arange(height * width, device=boxes_xyxy.device) == row * width + column  # [B, N, L]
    inside = torch.where(inside.any(-1, keepdim=True), inside, own_cell)  # [B, N, L]
    return inside.transpose(1, 2)  # [B, L, N]


def layout_bias(layout: LayoutBatch, grid: tuple[int, int], value: float) -> Tensor:
    """What is added to the attention logits of image tokens towards layout slots: 0 or -value, [B, L, N] float32.

    Padding slots get -value everywhere. An image without any box has no layout: its bias is 0 throughout.
    """
    allowed = cells_inside(layout.boxes_xyxy, grid) & layout.valid[:, None, :]  # [B, L, N]
    absent = ~layout.valid.any(dim=1)  # [B]
    allowed = allowed | absent[:, None, None]  # [B, L, N]
    return torch.zeros(allowed.shape, device=allowed.device).masked_fill(~allowed, -value)  # [B, L, N]


def attention_bias(image_bias: Tensor, buffer_size: int) -> Tensor:
    """Lays the bias of n image tokens out over the whole sequence of buffer and image tokens.

    image_bias: [B, n, N]; returns [B, 1, K + n, K + n], zero except in image rows and layout columns.
    """
    batch_size, num_image, num_boxes = image_bias.shape
    length = buffer_size + num_image
    bias = image_bias.new_zeros(batch_size, 1, length, length)  # [B, 1, K + n, K + n]
    bias[:, 0, buffer_size:, :num_boxes] = image_bias
    return bias
