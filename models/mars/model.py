"""MARS (arXiv:2407.07614): a frozen language model that draws and reads images, code by code.

    [BOS] caption | <img> c_0 ... c_{L-1} </img> | caption EOS

Text goes through the language model as it is, with its own table and head. Codes, `<img>` and `</img>` have a table of
their own (`visual_embed`) and go through the visual experts (`models/semvie.py`), so no frozen weight meets a trained
row. `visual_head` gives logits of the next code, and of `<img>` at positions of text. `</img>` comes after the last
code always, and is never predicted.

The head starts at zero: every code is as likely as any other, and no text is ever interrupted by an image.

A model of the super-resolution stage reads a small image before it draws the same one larger, with codes of one
tokenizer:

    [BOS] caption | <img> low codes </img> <img> c_0 ... c_{L-1}

Left out: the row and size tokens of other models, since grids are given.

Shape letters: B batch, t text positions, L codes of an image (h * w), K codes of the codebook, D width, V words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.mars.passes import Segment, read_by_segments, read_mixed
from models.semvie import TEXT, VISUAL, Routed, add_visual_experts, decoder_layers, load_visual_state, visual_state

LM_PREFIX = "lm."
INIT_STD = 0.02  # of the new rows, around the mean row of the text's table
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class MarsConfig:
    """num_codes: K, of the image tokenizer; grid: (h, w), codes of an image; copied_norms: of `add_visual_experts`;
    low_grid: of the small images that are made larger, None for a model that draws from captions. Raises ValueError for
    fewer than two codes, for an empty grid, and for a low grid that is not smaller."""

    num_codes: int
    grid: tuple[int, int]
    copied_norms: bool = False
    low_grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.num_codes < 2:
            raise ValueError(f"num_codes must be at least 2, got {self.num_codes}")
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise ValueError(f"grid must be two numbers of at least 1, (rows, columns), got {self.grid}")
        low = self.low_grid
        if low is not None and not (min(low) >= 1 and low[0] < self.grid[0] and low[1] < self.grid[1]):
            raise ValueError(f"low_grid must be smaller than the grid {self.grid}, got {low}")

    @property
    def num_tokens(self) -> int:
        """L"""
        return self.grid[0] * self.grid[1]

    @property
    def low_length(self) -> int:
        """Positions of a small image with its `<img>` and `</img>`; 0 for a model that draws from captions."""
        return 0 if self.low_grid is None else self.low_grid[0] * self.low_grid[1] + 2


@dataclass(frozen=True)
class TextBatch:
    """Rows of words, padded on one side. ids: [B, t] int64; valid: [B, t] bool, None: all are. Raises ValueError for
    shapes that differ."""

    ids: Tensor
    valid: Tensor | None = None

    def __post_init__(self) -> None:
        if self.ids.dim() != 2:
            raise ValueError(f"ids must be [B, t], got {tuple(self.ids.shape)}")
        if self.valid is not None and self.valid.shape != self.ids.shape:
            raise ValueError(f"valid is {tuple(self.valid.shape)}, ids are {tuple(self.ids.shape)}")

    @staticmethod
    def of(rows: Sequence[Sequence[int]], side: str, device: torch.device | str = "cpu") -> TextBatch:
        """Rows of word ids, which may be empty, padded on the "left" or on the "right"."""
        if side not in ("left", "right"):
            raise ValueError(f"side must be left or right, got {side!r}")
        length = max(map(len, rows), default=0)
        ids = torch.zeros(len(rows), length, dtype=torch.int64)  # [B, t]: padding is never looked at
        valid = torch.zeros(len(rows), length, dtype=torch.bool)  # [B, t]
        for index, row in enumerate(rows):
            where = slice(length - len(row), length) if side == "left" else slice(0, len(row))
            ids[index, where] = torch.tensor(row, dtype=torch.int64)
            valid[index, where] = True
        is_full = all(len(row) == length for row in rows)
        return TextBatch(ids.to(device), None if is_full else valid.to(device))

    def shown(self) -> Tensor:
        """Which positions are no padding: [B, t] bool."""
        return torch.ones_like(self.ids, dtype=torch.bool) if self.valid is None else self.valid  # [B, t]

    def to(self, device: torch.device | str) -> TextBatch:
        return TextBatch(self.ids.to(device), None if self.valid is None else self.valid.to(device))

    def __len__(self) -> int:
        return len(self.ids)


class Mars(nn.Module):
    """See the module's docstring. lm: a Hugging Face causal language model, which gets experts and is frozen."""

    def __init__(
        self, lm: Any, config: MarsConfig, generator: torch.Generator, expert_dtype: torch.dtype | None = None
    ) -> None:
        """generator: of the new rows, on the language model's device. expert_dtype: of all that trains; None takes the
        language model's. Raises ValueError for a language model that `require_language_model` or `require_plain_head`
        refuses."""
        super().__init__()
        add_visual_experts(lm, expert_dtype, config.copied_norms)
        self.config = config
        self.lm = lm
        table = lm.get_input_embeddings().weight
        factory = {"device": table.device, "dtype": expert_dtype or table.dtype}
        self.visual_embed = nn.Embedding(config.num_codes + 2, table.shape[1], **factory)
        self.visual_head = nn.Linear(table.shape[1], config.num_codes + 1, bias=False, **factory)
        if not table.is_meta:
            require_plain_head(lm)
            with torch.no_grad():
                self.visual_embed.weight.copy_(_new_rows(lm.get_input_embeddings(), config.num_codes + 2, generator))
        nn.init.zeros_(self.visual_head.weight)

    @property
    def image_start(self) -> int:
        """The row of `<img>` in `visual_embed` and `visual_head`."""
        return self.config.num_codes

    @property
    def image_end(self) -> int:
        """The row of `</img>` in `visual_embed`."""
        return self.config.num_codes + 1

    @property
    def decoder(self) -> Any:
        """The language model without its head."""
        return self.lm.get_decoder()

    @property
    def device(self) -> torch.device:
        return self.visual_embed.weight.device

    def trainable_names(self) -> list[str]:
        """Of the parameters that train, in their order."""
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    def fsdp_units(self) -> list[list[nn.Module]]:
        """Groups of modules that are sharded together, each of one precision: per layer the frozen ones, which a pass
        of images need not gather, and the experts; the tables of codes. The caller shards the root last."""
        groups: list[list[nn.Module]] = [[self.visual_embed], [self.visual_head]]
        for layer in decoder_layers(self.lm):
            routed = [module for module in layer.modules() if isinstance(module, Routed)]
            groups += [[module.text for module in routed], [module.visual for module in routed]]
        return groups

    def set_grad_checkpointing(self, is_on: bool) -> None:
        """Whether layers are computed again in the backward pass, in `train()`. Passes are mixed ones then."""
        if is_on:
            self.lm.activation_checkpointing_enable({"use_reentrant": False})
        else:
            self.lm.activation_checkpointing_disable()

    def visual_state(self) -> dict[str, Tensor]:
        """All that trains, by name: what a file holds beside its metadata."""
        return visual_state(self, LM_PREFIX)

    def load_visual_state(self, state: dict[str, Any], source: str) -> None:
        """Raises ValueError naming `source` for anything but what `visual_state` gives."""
        load_visual_state(self, LM_PREFIX, state, source)

    def text_segment(self, text: TextBatch) -> Segment:
        """Words, embedded by the frozen table."""
        return Segment(self.lm.get_input_embeddings()(text.ids), TEXT, text.valid)

    def image_segment(self, rows: Tensor) -> Segment:
        """Rows of `visual_embed`, [B, t] int64: codes, `image_start`, `image_end`."""
        table = self.lm.get_input_embeddings().weight
        return Segment(self.visual_embed(rows).to(table.dtype), VISUAL)

    def opened(self, codes: Tensor) -> Tensor:
        """`<img>` before the codes: [B, n] -> [B, 1 + n]."""
        start = codes.new_full((len(codes), 1), self.image_start)  # [B, 1]
        return torch.cat([start, codes], dim=1)  # [B, 1 + n]

    def closed(self, codes: Tensor) -> Tensor:
        """`<img>` before the codes of an image and `</img>` after them: [B, L] -> [B, L + 2]."""
        end = codes.new_full((len(codes), 1), self.image_end)  # [B, 1]
        return torch.cat([self.opened(codes), end], dim=1)  # [B, L + 2]

    def after_small(self, low: Tensor | None, rows: Tensor) -> Tensor:
        """The same image small before one that is made larger: [B, t] -> [B, l + 2 + t]; as it is without. Training
        reads both in one pass: alone, a small image would need some of the last layer's experts only.

        low: its codes, [B, l]. Raises ValueError as `require_small`.
        """
        self.require_small(low)
        return rows if low is None else torch.cat([self.closed(low), rows], dim=1)  # [B, l + 2 + t]

    def require_small(self, low: Tensor | None) -> None:
        """Raises ValueError for another number of codes of a small image, [B, l], than the model's low grid has, or
        any where it has none."""
        length = 0 if low is None else low.shape[1] + 2
        if length != self.config.low_length:
            grid = self.config.low_grid
            does = "draws from captions alone" if grid is None else f"makes images of the grid {grid} larger"
            raise ValueError(f"the model {does}, got {'no' if low is None else low.shape[1]} codes of a small image")

    def read(self, segments: Sequence[Segment]) -> list[Tensor]:
        """The states of each segment after the final norm, [B, t, D] each: by segments, or in one mixed pass where
        layers are computed again in the backward pass."""
        needs_mixed = self.decoder.training and self.decoder.is_activation_checkpointing
        return read_mixed(self.decoder, segments) if needs_mixed else read_by_segments(self.decoder, segments)

    def word_logits(self, states: Tensor) -> Tensor:
        """[..., D] -> [..., V], by the frozen head, in the language model's dtype."""
        return self.lm.get_output_embeddings()(states)  # [..., V]

    def code_logits(self, states: Tensor) -> Tensor:
        """Of the next code: [..., D] -> [..., K] float32."""
        return self._visual_logits(states)[..., : self.config.num_codes]  # [..., K]

    def image_logits(self, states: Tensor) -> Tensor:
        """That an image begins next, at positions of text: [..., D] -> [...] float32, a logit: of `<img>` against all
        words together. The words' own logits stay as they are."""
        rivals = self.word_logits(states).float().logsumexp(-1)  # [...]
        return self._visual_logits(states)[..., self.image_start] - rivals  # [...]

    def _visual_logits(self, states: Tensor) -> Tensor:
        return self.visual_head(states.to(self.visual_head.weight.dtype)).float()  # [..., K + 1]


@torch.no_grad()
def require_plain_head(lm: Any) -> None:
    """Raises ValueError if the logits of a language model are more than its head on the decoder's states, as where they
    are capped or scaled after it."""
    ids = torch.zeros(1, 1, dtype=torch.int64, device=lm.get_input_embeddings().weight.device)  # [1, 1]
    logits = lm(input_ids=ids, use_cache=False).logits  # [1, 1, V]
    plain = lm.get_output_embeddings()(lm.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state)  # [1, 1, V]
    if not torch.equal(logits, plain):
        found = (logits.float() - plain.float()).abs().max().item()
        raise ValueError(
            f"{type(lm).__name__} changes the logits after its head, by up to {found:g}: that is not known here"
        )


@torch.no_grad()
def _new_rows(embed: nn.Module, num_rows: int, generator: torch.Generator) -> Tensor:
    """The mean of a text table's rows, as the module gives them, and noise around it: [num_rows, D] float32. Where the
    module scales its rows, the noise is scaled as well."""
    weight = embed.weight
    assert isinstance(weight, Tensor)
    total = torch.zeros(weight.shape[1], device=weight.device)  # [D]
    for ids in torch.arange(len(weight), device=weight.device).split(_ROWS_AT_ONCE):
        total += embed(ids).float().sum(0)  # [D]
    first = torch.zeros(1, dtype=torch.int64, device=weight.device) + weight.float().norm(dim=1).argmax()  # [1]
    scale = embed(first).float().norm() / weight[first].float().norm().clamp(min=torch.finfo(torch.float32).tiny)  # []
    noise = torch.randn(num_rows, weight.shape[1], generator=generator, device=weight.device)  # [num_rows, D]
    return total / len(weight) + INIT_STD * scale * noise  # [num_rows, D]
