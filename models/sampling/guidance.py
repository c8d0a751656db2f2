"""Classifier-free guidance by text and by layout: which branches an image needs, and how their predictions combine.

    eps = eps_0 + w_text (eps_text - eps_0) + w_layout (eps_text+layout - eps_text)

Only the branches with a weight are computed.

Shape letters: B images, G guidance branches, C token channels, r rows (tokens).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, lerp

from models.conditioning import Conditions, stack_conditions
from models.sampling.config import SamplingConfig
from models.structmar import StructMAR
from util.types import LayoutBatch, TextContext

Scale = float | Tensor


@dataclass(frozen=True)
class Branches:
    """names: which of full, text, null are there, in that order; parts: the conditions of each, B rows."""

    names: tuple[str, ...]
    parts: tuple[Conditions, ...]

    @property
    def conditions(self) -> Conditions:
        """Of all branches, stacked along the batch: G * B rows."""
        return stack_conditions(self.parts)

    def with_full(self, conditions: Conditions) -> Branches:
        """The same with other conditions of the full branch."""
        return replace(self, parts=(conditions, *self.parts[1:]))

    def combine(self, eps: Tensor, w_text: Scale, w_layout: Scale) -> Tensor:
        """eps: [G, r, C], a prediction per branch (or [1, r, C], of the full one alone); returns the guided [r, C]."""
        return combine_branches(dict(zip(self.names[: len(eps)], eps.unbind(0), strict=True)), w_text, w_layout)


def combine_branches(eps: Mapping[str, Tensor], w_text: Scale, w_layout: Scale) -> Tensor:
    """eps: the prediction of each branch that is there, each [..., C]; returns the guided [..., C]. Scales that
    differ by row are tensors, which broadcast to these."""
    full = eps["full"]  # [..., C]
    if len(eps) == 1:
        return full
    if "text" not in eps:
        return lerp(eps["null"], full, w_text)  # [..., C]
    text = eps["text"]  # [..., C]
    if "null" not in eps:
        return lerp(text, full, w_layout)  # [..., C]
    if isinstance(w_layout, Tensor):
        return lerp(eps["null"], text, w_text).addcmul(w_layout, full - text)  # [..., C]
    return lerp(eps["null"], text, w_text).add(full - text, alpha=w_layout)  # [..., C]


def choose_branches(config: SamplingConfig, has_text: bool, has_layout: bool) -> tuple[tuple[str, ...], SamplingConfig]:
    """The names of the branches that have a weight (`full` first), and the config with the scale of an absent condition
    set to the other's."""
    if not has_layout:
        config = replace(config, cfg_layout=config.cfg_text)
    elif not has_text:
        config = replace(config, cfg_text=config.cfg_layout)
    names = ["full"]
    if config.cfg_text != config.cfg_layout:
        names.append("text")
    if config.cfg_text != 1.0:
        names.append("null")
    return tuple(names), config


def embed_branches(
    model: StructMAR,
    config: SamplingConfig,
    batch_size: int,
    text: TextContext | None,
    layout: LayoutBatch | None,
    labels: Tensor | None,
    grid: tuple[int, int] | None = None,
    negative: TextContext | None = None,
) -> tuple[Branches, SamplingConfig]:
    """Embeds the branches of `choose_branches`, and gives its config. grid: the model's own by default. negative: what
    the null branch reads, one row for all images or one for each."""
    has_text = text is not None or labels is not None
    names, config = choose_branches(config, has_text, layout is not None)
    if negative is not None and len(negative) == 1:
        negative = negative.repeated(batch_size)
    given = {"full": (labels, text, layout), "text": (labels, text, None), "null": (None, negative, None)}
    parts = tuple(model.embed_conditions(batch_size, *given[name], grid) for name in names)
    return Branches(names, parts), config
