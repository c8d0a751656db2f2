"""What steers the conditions while sampling goes on: a hook that is asked before every iteration.

The layout's schedule makes the layout fade as the image fills. At strength alpha an image token's attention to a box it
lies outside of is multiplied by (1 - alpha) + alpha e^-v, where v is the bias as trained:

    bias = log(1 - alpha (1 - e^-v)),    token = null + alpha (token - null).

At 1 this is the layout, at 0 the image has none, as training drops it. The share of the image that is visible decides,
not the iteration: after 30 % of 64 iterations MAR's schedule has drawn 11 % of 256 tokens.

Shape letters: B images, L image tokens, N boxes (max), D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from models.conditioning import Conditions
from models.sampling.auto_layout import build_auto_layout
from models.sampling.config import SamplingConfig
from models.structmar import StructMAR
from util.types import LayoutBatch, TextContext


class Controls(Protocol):
    """Conditions by iteration. One that changes or looks at little begins as `NoControls`."""

    def at(self, iteration: int, visible: float, conditions: Conditions) -> Conditions:
        """The fully conditioned branch's conditions in this iteration, given those of the run, of the whole batch; the
        guidance branches without text or layout stay as they are. visible: the share of the image's units that are
        known before this iteration. Returning an object that was returned in the iteration before saves preparing it
        again."""

    def observes(self, iteration: int) -> bool:
        """Whether `observe` wants the maps of this iteration."""

    def observe(self, iteration: int, maps: Tensor, rows: Sequence[int] | None) -> None:
        """After an iteration: what the image looked at in the caption (`models/attention_maps.py`), [b, L, T] of these
        rows of the batch (None: all), over the trunk's L tokens and the caption's, the null token first; T may be
        padded."""

    def changes(self, visible: Sequence[float]) -> frozenset[int]:
        """The iterations whose conditions are others than those of the iteration before. visible: the share that is
        known before each. What guidance reuses of earlier iterations is computed anew there."""


class NoControls:
    """The conditions of the run, in every iteration."""

    def observes(self, iteration: int) -> bool:
        return False

    def observe(self, iteration: int, maps: Tensor, rows: Sequence[int] | None) -> None:
        """Not asked for."""

    def at(self, iteration: int, visible: float, conditions: Conditions) -> Conditions:
        return conditions

    def changes(self, visible: Sequence[float]) -> frozenset[int]:
        return frozenset()


@dataclass(frozen=True)
class LayoutSchedule:
    """How strongly the layout counts: 1 until the share `on` of the image is visible, then linear to 0 over `decay`."""

    on: float
    decay: float

    @property
    def is_constant(self) -> bool:
        return self.on >= 1

    def strength(self, visible: float) -> float:
        """visible: share of the image, in [0, 1]."""
        if visible < self.on or self.is_constant:
            return 1.0
        return max(0.0, 1 - (visible - self.on) / self.decay) if self.decay else 0.0


class FadingLayout(NoControls):
    """The layout as its schedule says."""

    def __init__(self, schedule: LayoutSchedule, bare: Conditions) -> None:
        """bare: the run's conditions without a layout, of the whole batch."""
        self.schedule = schedule
        self.bare = bare
        self.faded: tuple[Conditions, float, Conditions] | None = None  # of these, to this strength: those

    def at(self, iteration: int, visible: float, conditions: Conditions) -> Conditions:
        strength = self.schedule.strength(visible)
        if strength == 1:
            return conditions
        if self.faded is None or self.faded[0] is not conditions or self.faded[1] != strength:
            self.faded = conditions, strength, fade(conditions, self.bare, strength)
        return self.faded[2]

    def changes(self, visible: Sequence[float]) -> frozenset[int]:
        strengths = [self.schedule.strength(share) for share in visible]
        return frozenset(i for i, (before, now) in enumerate(pairwise(strengths), start=1) if before != now)


def fade(conditions: Conditions, bare: Conditions, strength: float) -> Conditions:
    """The layout at a strength in [0, 1]: at 0 what the conditions are without one, at 1 they themselves."""
    if strength == 0:
        return replace(
            conditions, base=bare.base, layout_tokens=bare.layout_tokens, layout_bias=None, layout_scales=None
        )
    tokens, nulls, bias = conditions.layout_tokens, bare.layout_tokens, conditions.layout_bias
    assert tokens is not None and nulls is not None and bias is not None, "only a layout fades"
    scales = conditions.layout_scales
    return replace(
        conditions,
        base=torch.lerp(bare.base, conditions.base, strength),  # [B, D], which says whether anything is asked for
        layout_tokens=torch.lerp(nulls, tokens, strength),  # [B, N, D]
        layout_bias=faded_bias(bias, strength),  # [B, L, N]
        layout_scales=None if scales is None else 1 + strength * (scales - 1),  # [B, N]
    )


def faded_bias(bias: Tensor, strength: float) -> Tensor:
    """0 stays, -v becomes log(1 - strength (1 - e^-v)), v up to infinity."""
    return torch.log1p(strength * torch.expm1(bias))


class InTurn:
    """One control after the other: each gets what the one before it gave."""

    def __init__(self, controls: Sequence[Controls]) -> None:
        self.controls = controls

    def observes(self, iteration: int) -> bool:
        return any(each.observes(iteration) for each in self.controls)

    def observe(self, iteration: int, maps: Tensor, rows: Sequence[int] | None) -> None:
        for each in self.controls:
            if each.observes(iteration):
                each.observe(iteration, maps, rows)

    def at(self, iteration: int, visible: float, conditions: Conditions) -> Conditions:
        for each in self.controls:
            conditions = each.at(iteration, visible, conditions)
        return conditions

    def changes(self, visible: Sequence[float]) -> frozenset[int]:
        return frozenset().union(*(each.changes(visible) for each in self.controls))


def starting_layout(config: SamplingConfig, layout: LayoutBatch | None) -> LayoutBatch | None:
    """The layout that the options make of the one given, before the first iteration."""
    if layout is None:
        return None
    if config.drop_grounding_tokens:
        return layout.dropped(torch.ones_like(layout.valid[:, 0]))
    return layout.with_scale(config.layout_scale)


def own_controls(
    model: StructMAR,
    config: SamplingConfig,
    text: TextContext | None,
    layout: LayoutBatch | None,
    labels: Tensor | None,
    grid: tuple[int, int],
    phrase_weights: Tensor | None = None,
) -> Controls:
    """What the options say of the conditions by iteration, for a run of these images. layout: as it is given;
    phrase_weights: see `build_auto_layout`, which says what it raises."""
    controls: list[Controls] = []
    if layout is not None:
        layout = layout.with_scale(config.layout_scale)
    if config.mask_threshold is not None:
        controls.append(build_auto_layout(model, config, text, layout, phrase_weights, grid, labels))
    schedule = LayoutSchedule(*config.layout_schedule)
    if layout is not None and not schedule.is_constant:
        controls.append(FadingLayout(schedule, model.embed_conditions(len(layout), labels, text, None, grid)))
    if len(controls) > 1:
        return InTurn(controls)
    return controls[0] if controls else NoControls()
