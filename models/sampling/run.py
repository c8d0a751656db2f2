"""The sampler's loop: tokens are unmasked in some order, each drawn by the head, under guidance by text and layout.

An iteration is one pass of the backbone per guidance branch (`condition_cache.py` leaves some out) and the head's
drawing of the tokens it unmasks. Every image draws from its own generator, so that it does not depend on its batch.

Everything that needs the host or does not depend on the tokens comes before the loop, which only queues kernels (but
for orders by confidence on a head without noise of the whole grid, and for controls that change the conditions).

A token is here what is hidden and drawn on its own (`StructMARConfig.unit_grid`).

Shape letters: B images, G guidance branches, L image tokens, D width, C token channels, p tokens unmasked in one
iteration, u tokens unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from models.attention_maps import AttentionWatch
from models.conditioning import Conditions
from models.context import Context
from models.heads.base import HeadOutput, HeadSampler, HeadStep, HeadTrace
from models.sampling.condition_cache import GuidedBackbone, IterationPlan, plan_iterations
from models.sampling.config import BranchUse, SamplingConfig, guidance_scales
from models.sampling.controls import Controls
from models.sampling.guidance import Branches
from models.sampling.orders import (
    ConfidenceOrder,
    DecodeState,
    Order,
    PlannedOrder,
    draw_orders,
    unknown_first,
)
from models.structmar import StructMAR

NoiseSource = Callable[[int, HeadStep, int], Tensor]
"""(iteration, head, tokens an image) -> all randomness of these tokens, [..., B, p, C]; of all L tokens for a head with
noise of the whole grid."""
OnIteration = Callable[[int, Tensor], Tensor | None]
"""(iteration that is done, tokens [B, L, C]) -> None, or tokens to go on with. With known tokens, images with as many
unknown ones are sampled together, one such group after the other, each from iteration 0 on."""


@dataclass(frozen=True)
class KnownTokens:
    """What is known before sampling. tokens: [B, L, C]; known: [B, L] bool, any number of tokens in each row."""

    tokens: Tensor
    known: Tensor


@dataclass(frozen=True)
class SampleOutput:
    """tokens: [B, L, C]. latents: [B, C, h, w], scaled. orders: [B, L], the order in which tokens were unmasked, from
    its end; what was known before comes last. commit_steps: [B, L], the iteration of each token, -1 where it was known
    before; a run that was stopped names those that were still to come. grid: (rows, columns) of the trunk's tokens.
    trace: or None."""

    tokens: Tensor
    latents: Tensor
    orders: Tensor
    commit_steps: Tensor
    grid: tuple[int, int]
    trace: HeadTrace | None = None


@dataclass(frozen=True)
class SamplingRun:
    """What all iterations share. branches: of the whole batch; rows: the images of it that are sampled, None: all.
    generators: one for each of these."""

    model: StructMAR
    branches: Branches
    config: SamplingConfig
    generators: Sequence[torch.Generator]
    controls: Controls
    dtype: torch.dtype = torch.float32
    record: bool = False
    rows: tuple[int, ...] | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the trunk's tokens."""
        return self.branches.parts[0].grid

    @property
    def unit_grid(self) -> tuple[int, int]:
        """(rows, columns) of what is drawn on its own."""
        return self.model.config.unit_grid(self.grid)

    def own_order(self, counts: Sequence[int], known: Tensor | None = None) -> Order:
        """`config.order`. known: [B, L] bool, as many in every row as `counts` say are known from the start."""
        if not self.config.is_blind:
            return ConfidenceOrder(counts)
        device = self.model.fake_latent.device
        orders = draw_orders(self.config.order, len(self.generators), self.unit_grid, self.generators).to(device)
        return PlannedOrder(orders if known is None else unknown_first(orders, known), counts)

    def start(self, known: KnownTokens | None = None) -> DecodeState:
        """The state before the first iteration. known: of the images that are sampled, the same number in every row."""
        device, batch_size, num_tokens = self.model.fake_latent.device, len(self.generators), math.prod(self.unit_grid)
        if known is None:
            tokens = self.model.head.empty_tokens(batch_size, num_tokens, device)  # [B, L, C]
            nothing = torch.zeros(batch_size, num_tokens, dtype=torch.bool, device=device)  # [B, L]
            return DecodeState(tokens, nothing, 0, num_tokens, self.generators)
        num_masked = num_tokens - int(known.known[0].sum())
        return DecodeState(known.tokens.to(device), known.known.to(device), 0, num_masked, self.generators)

    def only(self, rows: Sequence[int], num_iter: int) -> SamplingRun:
        """The same for some of the images, in so many iterations."""
        generators = [self.generators[row] for row in rows]
        config = replace(self.config, num_iter=num_iter)
        return replace(self, generators=generators, config=config, rows=tuple(rows))

    def conditions(self, full: Conditions) -> Conditions:
        """Of all branches of the images that are sampled. full: the full branch's, of the whole batch."""
        branches = self.branches.with_full(full)
        if self.rows is not None:
            branches = replace(branches, parts=tuple(part.rows(self.rows) for part in branches.parts))
        return branches.conditions

    def output(self, tokens: Tensor, orders: Tensor, steps: Tensor, trace: HeadTrace | None) -> SampleOutput:
        return SampleOutput(tokens, self.model.unpatchify(tokens, self.grid), orders, steps, self.grid, trace)


def unmask(
    run: SamplingRun,
    state: DecodeState,
    order: Order,
    noise: NoiseSource | None = None,
    on_iteration: OnIteration | None = None,
    should_stop: Callable[[], bool] | None = None,
    iterations: Iterable[int] | None = None,
    contexts: Contexts | None = None,
) -> tuple[Tensor, Tensor, HeadTrace | None]:
    """The loop. noise: by default each image's own generator's. iterations: those of a planned order that run, to time
    a part of it; None: all. contexts: of the run's conditions, where they are there already. Returns tokens
    [B, L, C], the order in which they were unmasked [B, L], and the trace if it is recorded."""
    config, counts = run.config, order.counts
    batch_size, num_tokens = state.known.shape
    visible = [1 - count / num_tokens for count in counts]
    contexts = contexts or Contexts(run)
    head = contexts.at(0, visible[0]).head
    assert head is not None, "a context for sampling has a head"
    if order.uses_confidence and not head.has_confidence:
        raise ValueError(f"{type(order).__name__} goes by confidence, which {type(head).__name__} does not have")
    noises = _Noises(run, head, order, num_tokens, noise)
    trace = None
    if run.record:
        trace = head.empty_trace(batch_size, num_tokens, config.head_options(0), state.tokens.device)
    uses = config.branch_uses(len(run.branches.names), run.controls.changes(visible[:-1]))
    plans = plan_iterations(order, uses) if isinstance(order, PlannedOrder) else None
    orders = order.orders if isinstance(order, PlannedOrder) else _empty_orders(state)  # [B, L]
    backbone = GuidedBackbone(len(run.branches.names))
    for iteration in range(config.num_iter) if iterations is None else iterations:
        if should_stop is not None and should_stop():
            break
        plan = plan_next(state, order, uses) if plans is None else plans[iteration]
        context = contexts.at(iteration, visible[iteration])
        z = run_backbone(run, backbone, context, state.tokens, plan, iteration).flatten(1, 2)  # [G, B * p, D]
        w_text, w_layout = guidance_scales(config, num_tokens, counts[iteration + 1], iteration)
        guide = partial(run.branches.combine, w_text=w_text, w_layout=w_layout)
        chosen = noises.at(iteration, plan.token_ids)  # [..., B, p, C]
        drawn = noises.step(iteration).sample(z, guide, chosen.flatten(-3, -2), run.record)
        token_ids, state = keep_drawn(state, order, plan, drawn, counts[iteration + 1])
        if plans is None:
            orders[:, counts[iteration + 1] : counts[iteration]] = token_ids
        if trace is not None:
            trace.write(plan.token_ids, drawn.record)
        if on_iteration is not None and (changed := on_iteration(iteration, state.tokens)) is not None:
            state = replace(state, tokens=changed)
    if plans is None and state.num_masked:  # it was stopped
        orders[:, : state.num_masked] = state.unknown_ids()
    return state.tokens, orders, trace


def run_backbone(
    run: SamplingRun, backbone: GuidedBackbone, context: Context, tokens: Tensor, plan: IterationPlan, iteration: int
) -> Tensor:
    """As `GuidedBackbone` gives it, [G, B, p, D]; the controls see the maps that they ask for."""
    if not run.controls.observes(iteration):
        return backbone(context, tokens, plan)  # [G, B, p, D]
    watch = AttentionWatch(len(tokens), run.model.config.buffer_size)
    z = backbone(context.watched(watch), tokens, plan)  # [G, B, p, D]
    run.controls.observe(iteration, watch.maps(), run.rows)
    return z


class _Noises:
    """The head at the options of each iteration, and its noise, drawn here where it is known how much is needed."""

    def __init__(
        self, run: SamplingRun, head: HeadSampler, order: Order, num_tokens: int, source: NoiseSource | None
    ) -> None:
        self.options = [run.config.head_options(iteration) for iteration in range(run.config.num_iter)]
        self.steps = {each: head.at(each) for each in dict.fromkeys(self.options)}
        self.source = source or (lambda _, step, count: step.draw_noise(run.generators, count))
        self.has_grid_noise = head.has_grid_noise
        sizes = [now - after for now, after in pairwise(order.counts)]
        if self.has_grid_noise:
            sizes = [num_tokens] * len(sizes)
        is_known = self.has_grid_noise or not order.uses_confidence
        self.drawn = [self._draw(iteration, size) for iteration, size in enumerate(sizes)] if is_known else None

    def step(self, iteration: int) -> HeadStep:
        return self.steps[self.options[iteration]]

    def at(self, iteration: int, token_ids: Tensor) -> Tensor:
        """Of the tokens [B, p] that an iteration draws: [..., B, p, C]."""
        if self.drawn is None:
            return self._draw(iteration, token_ids.shape[1])
        noise = self.drawn[iteration]  # [..., B, p or L, C]
        if not self.has_grid_noise:
            return noise
        places = token_ids[..., None].expand(*noise.shape[:-3], *token_ids.shape, noise.shape[-1])
        return noise.gather(-2, places)

    def _draw(self, iteration: int, num_tokens: int) -> Tensor:
        return self.source(iteration, self.step(iteration), num_tokens)


def plan_next(state: DecodeState, order: Order, uses: Sequence[BranchUse]) -> IterationPlan:
    """The coming iteration of an order that decides as it goes. A run whose differences are reused later asks for all
    unknown tokens, since nobody knows yet which will be next."""
    unknown_ids = state.unknown_ids()  # [B, u]
    token_ids = unknown_ids if order.uses_confidence else order.next(state, None)  # [B, p]
    is_reused = state.iteration + 1 < len(uses) and uses[state.iteration + 1] == "reuse"
    asked_ids = unknown_ids if is_reused else token_ids  # [B, P]
    return IterationPlan(state.known_ids(), token_ids, uses[state.iteration], asked_ids, is_reused)


def keep_drawn(
    state: DecodeState, order: Order, plan: IterationPlan, drawn: HeadOutput, num_masked: int
) -> tuple[Tensor, DecodeState]:
    """The tokens that this iteration unmasks [B, p], and the state after it. num_masked: in a row, after it."""
    token_ids, tokens = plan.token_ids, drawn.tokens.unflatten(0, plan.token_ids.shape)  # [B, p], [B, p, C]
    if order.uses_confidence:
        assert drawn.confidence is not None
        token_ids = order.next(state, drawn.confidence.unflatten(0, plan.token_ids.shape))  # [B, p]
        places = torch.searchsorted(plan.token_ids.contiguous(), token_ids)  # [B, p], among the unknown
        tokens = tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[2]))  # [B, p, C]
    return token_ids, DecodeState(
        state.tokens.scatter(1, token_ids[..., None].expand_as(tokens), tokens),  # [B, L, C]
        state.known.scatter(1, token_ids, True),  # [B, L]
        state.iteration + 1,
        num_masked,
        state.generators,
    )


class Contexts:
    """The context of each iteration; prepared anew only where the controls gave other conditions, and of these only the
    layout where the captions stayed."""

    def __init__(self, run: SamplingRun, before: Context | None = None) -> None:
        """before: a context of this model, whose cast weights are used again."""
        self.run = run
        self.asked: tuple[int, float] | None = None
        self.conditions: Conditions | None = None
        self.context = before

    def at(self, iteration: int, visible: float) -> Context:
        """visible: the share of the units that are known before the iteration."""
        run = self.run
        if (iteration, visible) != self.asked:  # the controls are asked once
            conditions = run.controls.at(iteration, visible, run.branches.parts[0])
            if self.conditions is None or not conditions.has_text_of(self.conditions):
                self.context = run.model.prepare(run.conditions(conditions), run.dtype, before=self.context)
            elif conditions is not self.conditions:
                assert self.context is not None
                self.context = run.model.prepare_layout(run.conditions(conditions), run.dtype, self.context)
            self.asked, self.conditions = (iteration, visible), conditions
        assert self.context is not None
        return self.context


def _empty_orders(state: DecodeState) -> Tensor:
    """[B, L]: what is known stands at the end, the rest is filled in as it is unmasked."""
    unset = torch.zeros(state.known.shape[0], state.num_masked, dtype=torch.int64, device=state.known.device)
    return torch.cat([unset, state.known_ids()], dim=1)  # [B, L]
