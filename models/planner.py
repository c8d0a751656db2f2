"""From a caption to a layout: an autoregressive transformer that writes boxes as tokens.

    category x0 y0 x1 y1  category x0 y0 x1 y1  ...  END

Objects stand by falling area, as `engine.data.coco.make_layout` gives them. Corners are rounded to `num_bins` places.
Every token attends to those before it and to the caption's token states. What may stand at a place is masked: a
category or END first, then corners with x0 < x1 and y0 < y1; so every sequence is a layout. Trained by cross-entropy
(p of the real layout), sampled token by token, so that a caption has many layouts instead of the mean of them all.
Boxes as tokens: Pix2Seq (arXiv:2109.10852); layouts as token sequences: LayoutTransformer (arXiv:2006.14615).

Left out: the sizes of pictures (boxes are fractions of whatever is drawn), boxes that are given, beam search.

Shape letters: B batch, S tokens of a layout, D width, H heads, d head width, T text tokens, C text channels, V tokens,
N boxes (max), n boxes of one image, p tokens so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks import merge_heads, split_heads
from util.boxes import areas
from util.types import Layout, LayoutBatch, TextContext

SLOTS = 5  # tokens of an object: its category and four corners
PADDING = -1  # behind END


@dataclass(frozen=True)
class PlannerConfig:
    """The sizes of a planner. text_dim: channels of the caption's states. Raises ValueError for what fits no model."""

    num_categories: int
    text_dim: int
    max_objects: int = 16
    num_bins: int = 64
    width: int = 256
    depth: int = 4
    num_heads: int = 4
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("num_categories", "text_dim", "max_objects", "width", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_bins < 2:
            raise ValueError(f"num_bins must be at least 2, got {self.num_bins}")
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is no multiple of num_heads {self.num_heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")

    @property
    def end(self) -> int:
        """The token that ends a layout; categories are the tokens before it, bins those behind it."""
        return self.num_categories

    @property
    def first_bin(self) -> int:
        return self.num_categories + 1

    @property
    def num_tokens(self) -> int:
        return self.first_bin + self.num_bins

    @property
    def max_length(self) -> int:
        """Tokens of the longest layout, with END."""
        return SLOTS * self.max_objects + 1


def layout_tokens(layout: LayoutBatch, config: PlannerConfig) -> Tensor:
    """Layouts as tokens [B, S] int64, largest box first; END behind the last one, then PADDING.

    A corner is the nearest of the bins; a side whose ends are nearest to one bin becomes one bin long.
    """
    sizes = areas(layout.boxes_xyxy).masked_fill(~layout.valid, -1)  # [B, N]
    order = sizes.argsort(dim=1, descending=True, stable=True)  # [B, N]
    boxes = layout.boxes_xyxy.gather(1, order[..., None].expand(-1, -1, 4))  # [B, N, 4]
    categories, valid = layout.categories.gather(1, order), layout.valid.gather(1, order)  # [B, N], [B, N]
    last = config.num_bins - 1
    low, high = boxes[..., :2] * last, boxes[..., 2:] * last  # [B, N, 2]
    is_thin = low.round() == high.round()  # [B, N, 2]
    low = torch.where(is_thin, low.floor(), low.round()).clamp(max=last - 1)  # [B, N, 2]
    high = torch.maximum(high.round(), low + 1)  # [B, N, 2]
    corners = torch.cat([low, high], -1).long() + config.first_bin  # [B, N, 4]
    objects = torch.cat([categories[..., None], corners], -1).masked_fill(~valid[..., None], PADDING)  # [B, N, 5]
    tokens = F.pad(objects.flatten(1), (0, 1), value=PADDING)  # [B, 5N + 1]
    counts = valid.sum(1)  # [B]
    tokens = tokens.scatter(1, SLOTS * counts[:, None], config.end)  # [B, 5N + 1]
    return tokens[:, : SLOTS * int(counts.max()) + 1]  # [B, S]


def layout_of(tokens: Tensor, config: PlannerConfig) -> Layout:
    """tokens: [S], as `layout_tokens` writes them. Raises ValueError if there is no END behind whole objects."""
    ends = (tokens == config.end).nonzero()[:, 0]  # [ends]
    if len(ends) == 0 or int(ends[0]) % SLOTS:
        raise ValueError(f"tokens must be whole objects with END behind them, got {tokens.tolist()}")
    objects = tokens[: int(ends[0])].view(-1, SLOTS).cpu()  # [n, 5]
    boxes = (objects[:, 1:] - config.first_bin).float() / (config.num_bins - 1)  # [n, 4]
    return Layout(boxes, objects[:, 0].contiguous())


def legal_tokens(tokens: Tensor, config: PlannerConfig, max_objects: int | None = None) -> Tensor:
    """What may stand at every place, given the tokens before it: [B, S, V] bool.

    tokens: [B, S]; the last of them is not looked at. max_objects: at most so many boxes, None: the model's.
    """
    limit = config.max_objects if max_objects is None else min(max_objects, config.max_objects)
    places = torch.arange(tokens.shape[1], device=tokens.device)  # [S]
    slots, objects = places % SLOTS, places // SLOTS  # [S], [S]
    values = torch.arange(config.num_tokens, device=tokens.device)  # [V]
    begins = (values < config.end) & (objects[:, None] < limit) | (values == config.end)  # [S, V]
    bins = values - config.first_bin  # [V]
    is_low = (bins >= 0) & (bins < config.num_bins - 1)  # [V]
    opposite = tokens.roll(2, 1)[..., None]  # [B, S, 1], the corner two places before
    is_high = (values >= config.first_bin) & (values > opposite)  # [B, S, V]
    of_slot = slots[:, None]  # [S, 1]
    legal = torch.where(of_slot == 0, begins, is_low)  # [S, V]
    return torch.where(of_slot >= 3, is_high, legal)  # [B, S, V]


@dataclass(frozen=True)
class TextKeys:
    """A caption's keys and values in one block: [B, H, T, d] each. valid: [B, T] bool."""

    keys: Tensor
    values: Tensor
    valid: Tensor


Past = tuple[Tensor, Tensor]
"""Keys and values [B, H, p, d] of the tokens so far, in one block."""


class PlannerBlock(nn.Module):
    """x = x + SelfAttn(N(x)); x = x + CrossAttn(N(x), text); x = x + MLP(N(x))."""

    def __init__(self, config: PlannerConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.cross_q, self.cross_kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.cross_proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(config.dropout)

    def text_keys(self, text: Tensor, valid: Tensor) -> TextKeys:
        """text: [B, T, D]; valid: [B, T]."""
        keys, values = (split_heads(part, self.num_heads) for part in self.cross_kv(text).chunk(2, -1))  # [B, H, T, d]
        return TextKeys(keys, values, valid)

    def forward(self, x: Tensor, text: TextKeys, past: Past | None = None) -> tuple[Tensor, Past]:
        """x: [B, S, D], or [B, 1, D] behind `past`. Returns the same shape, and `past` with the new tokens."""
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(self.norm1(x)).chunk(3, -1))  # [B, H, S, d]
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)  # [B, H, p + 1, d]
        dropout = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=past is None)  # [B, H, S, d]
        x = x + self.drop(self.proj(merge_heads(seen)))  # [B, S, D]
        q = split_heads(self.cross_q(self.norm2(x)), self.num_heads)  # [B, H, S, d]
        mask = text.valid[:, None, None, :]  # [B, 1, 1, T]
        read = F.scaled_dot_product_attention(q, text.keys, text.values, mask, dropout)  # [B, H, S, d]
        x = x + self.drop(self.cross_proj(merge_heads(read)))  # [B, S, D]
        return x + self.drop(self.mlp(self.norm3(x))), (k, v)  # [B, S, D]


class Planner(nn.Module):
    """Trained by `forward`, which gives the loss; `propose` writes layouts."""

    def __init__(self, config: PlannerConfig) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.text_proj = nn.Sequential(
            nn.LayerNorm(config.text_dim), nn.Linear(config.text_dim, width), nn.LayerNorm(width)
        )
        self.token_embed = nn.Embedding(config.num_tokens + 1, width)  # the last: before the first token
        self.object_embed = nn.Embedding(config.max_objects + 1, width)
        self.slot_embed = nn.Embedding(SLOTS, width)
        self.blocks = nn.ModuleList(PlannerBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.num_tokens)
        self.drop = nn.Dropout(config.dropout)
        for embedding in (self.token_embed, self.object_embed, self.slot_embed):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor, text: TextContext) -> Tensor:
        """The mean cross-entropy of the tokens of layouts [B, S] (see `layout_tokens`), in nats per token."""
        logits = self.logits(tokens, text)  # [B, S, V]
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), ignore_index=PADDING)

    def logits(self, tokens: Tensor, text: TextContext) -> Tensor:
        """Of every token given those before it: [B, S, V] float32, -inf where a token may not stand. tokens: [B, S]."""
        begin = torch.full_like(tokens[:, :1], self.config.num_tokens)  # [B, 1]
        before = torch.cat([begin, tokens[:, :-1]], 1)  # [B, S]
        x = self.embed(before.masked_fill(before == PADDING, self.config.end), 0)  # [B, S, D]
        for block, keys in zip(self.blocks, self.read(text), strict=True):
            x, _ = block(x, keys)  # [B, S, D]
        return self.head(self.norm(x)).float().masked_fill(~legal_tokens(tokens, self.config), -torch.inf)  # [B, S, V]

    def read(self, text: TextContext) -> list[TextKeys]:
        """The caption for each block. A caption without tokens is a row without valid ones: its first one counts."""
        states = self.text_proj(text.tokens.to(self.head.weight.dtype))  # [B, T, D]
        is_empty = ~text.valid.any(1, keepdim=True)  # [B, 1]
        valid = text.valid | is_empty & (torch.arange(text.valid.shape[1], device=is_empty.device) == 0)  # [B, T]
        return [block.text_keys(states, valid) for block in self.blocks]  # type: ignore[operator]

    def embed(self, before: Tensor, first: int) -> Tensor:
        """The tokens before the places `first`, `first` + 1, ... [B, S] -> [B, S, D]."""
        places = torch.arange(first, first + before.shape[1], device=before.device)  # [S]
        where = self.object_embed(places // SLOTS) + self.slot_embed(places % SLOTS)  # [S, D]
        return self.drop(self.token_embed(before) + where)  # [B, S, D]

    @torch.no_grad()
    def propose(
        self,
        text: TextContext,
        generators: Sequence[torch.Generator],
        temperature: float = 1.0,
        max_objects: int | None = None,
    ) -> list[Layout]:
        """One layout per caption, each drawn by its own generator (on the CPU) alone.

        temperature: 1 draws as trained, less draws likelier tokens, 0 the likeliest. max_objects: at most so many
        boxes. Raises ValueError if captions and generators differ in number or the temperature is negative.
        """
        if len(generators) != len(text):
            raise ValueError(f"every caption needs its generator, got {len(text)} and {len(generators)}")
        if temperature < 0:
            raise ValueError(f"temperature must not be negative, got {temperature}")
        config, device = self.config, text.tokens.device
        draws = torch.stack([torch.rand(config.max_length, generator=each) for each in generators])  # [B, S]
        draws = draws.to(device, torch.float64)  # [B, S]
        was_training = self.training
        self.eval()
        keys, past = self.read(text), [None] * config.depth
        tokens = torch.full((len(text), config.max_length), config.end, device=device)  # [B, S]
        before = torch.full((len(text), 1), config.num_tokens, device=device)  # [B, 1]
        has_ended = torch.zeros(len(text), dtype=torch.bool, device=device)  # [B]
        for place in range(config.max_length):
            x = self.embed(before, place)  # [B, 1, D]
            for index, block in enumerate(self.blocks):
                x, past[index] = block(x, keys[index], past[index])  # [B, 1, D]
            logits = self.head(self.norm(x))[:, 0].double()  # [B, V]
            legal = legal_tokens(tokens[:, : place + 1], config, max_objects)[:, place]  # [B, V]
            drawn = draw_token(logits.masked_fill(~legal, -torch.inf), draws[:, place], temperature)  # [B]
            tokens[:, place] = torch.where(has_ended, config.end, drawn)  # [B]
            has_ended |= tokens[:, place] == config.end  # [B]
            before = tokens[:, place : place + 1]  # [B, 1]
            if bool(has_ended.all()):
                break
        self.train(was_training)
        return [layout_of(row, config) for row in tokens]


def draw_token(logits: Tensor, draws: Tensor, temperature: float) -> Tensor:
    """One token per row by the inverse of its distribution. logits: [B, V]; draws: [B] in [0, 1); returns [B]."""
    if temperature == 0:
        return logits.argmax(-1)  # [B]
    mass = (logits / temperature).softmax(-1).cumsum(-1)  # [B, V]
    return (mass <= draws[:, None] * mass[:, -1:]).sum(-1)  # [B]
