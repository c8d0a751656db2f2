"""Sampling: images from conditions, from nothing or from tokens that are known (the loop: `run.py`).

Where tokens are known, the iterations are those of the unknown ones. With `SamplingConfig.prefix_k` the first tokens
are drawn one by one, row by row, and are then known.

A token is here what is hidden and drawn on its own (`StructMARConfig.unit_grid`).

Shape letters: B images, L image tokens, C token channels, K tokens of a prefix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from models.sampling.config import SamplingConfig
from models.sampling.controls import Controls, own_controls, starting_layout
from models.sampling.few import require_head_of
from models.sampling.guidance import embed_branches
from models.sampling.orders import DecodeState, Order, commit_steps
from models.sampling.run import Contexts, KnownTokens, NoiseSource, OnIteration, SampleOutput, SamplingRun, unmask
from models.structmar import StructMAR
from util.types import LayoutBatch, TextContext

__all__ = ["KnownTokens", "NoiseSource", "OnIteration", "SampleOutput", "SamplingRun", "sample", "unmask"]


@torch.no_grad()
def sample(
    model: StructMAR,
    config: SamplingConfig,
    generators: Sequence[torch.Generator],
    text: TextContext | None = None,
    layout: LayoutBatch | None = None,
    labels: Tensor | None = None,
    *,
    negative: TextContext | None = None,
    grid: tuple[int, int] | None = None,
    known: KnownTokens | None = None,
    order: Order | None = None,
    controls: Controls | None = None,
    phrase_weights: Tensor | None = None,
    on_iteration: OnIteration | None = None,
    should_stop: Callable[[], bool] | None = None,
    record: bool = False,
    dtype: torch.dtype = torch.float32,
) -> SampleOutput:
    """Samples one image per generator. The model must be in eval mode; conditions lie on its device, [B, ...].

    negative: the encoded `config.negative_prompt`, one row for all images or one for each; it is given where that is.
    grid: (rows, columns) of the trunk's tokens, the config's by default. known: tokens to start from. order: instead of
    `config.order`; not together with `known` or a prefix. controls: of the conditions by iteration, from 0 again behind
    a prefix; by default those of the config. phrase_weights: [B, T, N], for `mask_threshold`: the share of each of the
    caption's tokens in what names a box. should_stop: asked before each iteration; what is masked then stays zero.
    record: keeps how the head drew. dtype: of weights and matrix products.
    Raises ValueError if the number of images disagrees, num_iter exceeds the number of tokens, the grid is unknown to
    the model, the options are another head's, or a recording is wanted where it cannot be scored
    (`SamplingConfig.require_traceable`).
    """
    batch_size = len(generators)
    grid = model.config.grid if grid is None else grid
    require_head_of(config, model.config)
    for name, given in (("text", text), ("layout", layout), ("labels", labels)):
        if given is not None and len(given) != batch_size:
            raise ValueError(f"{name} is for {len(given)} images, but there are {batch_size} generators")
    assert not model.training, "sampling needs model.eval()"
    if record:
        config.require_traceable()
    if order is not None and (known is not None or config.prefix_k):
        what = "known tokens are" if known is not None else f"what prefix_k {config.prefix_k} leaves is"
        raise ValueError(f"{what} sampled in config.order {config.order}, got order {type(order).__name__}")
    num_tokens = math.prod(model.config.unit_grid(grid))
    config.require_fitting(num_tokens)
    if (negative is not None) != bool(config.negative_prompt):
        said = f"negative_prompt {config.negative_prompt!r}"
        raise ValueError(f"{said} goes with its encoded states, got {'none' if negative is None else 'some'}")
    first = starting_layout(config, layout)
    if controls is None:
        controls = own_controls(model, config, text, layout, labels, grid, phrase_weights)
    branches, config = embed_branches(model, config, batch_size, text, first, labels, grid, negative)
    run = SamplingRun(model, branches, config, generators, controls, dtype, record)
    if config.prefix_k and known is None:
        return _sample_after_prefix(run, on_iteration, should_stop)
    if known is not None:
        _require_prefix(known, config.prefix_k)
        return _sample_unknown(run, known, on_iteration, should_stop)
    if order is None:
        order = run.own_order(config.masked_counts(num_tokens))
    if (len(order.counts), order.counts[0], order.counts[-1]) != (config.num_iter + 1, num_tokens, 0):
        raise ValueError(
            f"an order for {config.num_iter} iterations of {num_tokens} tokens has {config.num_iter + 1} counts from "
            f"{num_tokens} to 0, got {list(order.counts)}"
        )
    tokens, orders, trace = unmask(run, run.start(), order, on_iteration=on_iteration, should_stop=should_stop)
    return run.output(tokens, orders, commit_steps(orders, order.counts), trace)


def _sample_unknown(
    run: SamplingRun,
    known: KnownTokens,
    on_iteration: OnIteration | None,
    should_stop: Callable[[], bool] | None,
) -> SampleOutput:
    """Images with as many unknown tokens are sampled together: an iteration hides equally many in every row."""
    if run.record:
        raise ValueError("tokens that are known before sampling have no reverse process to record")
    device = run.model.fake_latent.device
    shape = (len(run.generators), math.prod(run.unit_grid))
    if known.known.shape != shape or known.tokens.shape != (*shape, run.model.head.token_dim):
        raise ValueError(
            f"known tokens must be {[*shape, run.model.head.token_dim]} with a mask {list(shape)}, "
            f"got {list(known.tokens.shape)} and {list(known.known.shape)}"
        )
    tokens = torch.where(known.known.to(device)[..., None], known.tokens.to(device), 0)  # [B, L, C]
    orders = torch.arange(shape[1], device=device).repeat(shape[0], 1)  # [B, L]
    steps = torch.full_like(orders, -1)  # [B, L]
    num_unknown = (~known.known).sum(1).tolist()
    run.config.require_start(min((count for count in num_unknown if count), default=0))
    context = run.model.prepare(run.branches.conditions, run.dtype)  # its cast weights serve all groups
    for count in sorted(set(num_unknown) - {0}, reverse=True):
        rows = [row for row, each in enumerate(num_unknown) if each == count]
        part = run.only(rows, min(run.config.num_iter, count))
        state = part.start(KnownTokens(tokens[rows], known.known[rows]))
        order, contexts = part.own_order(part.config.masked_counts(count), state.known), Contexts(part, context)

        def follow(iteration: int, drawn: Tensor, rows: Sequence[int] = rows) -> Tensor | None:
            tokens[rows] = drawn
            changed = None if on_iteration is None else on_iteration(iteration, tokens)
            if changed is None:
                return None
            tokens.copy_(changed)
            return tokens[rows]

        drawn, taken, _ = unmask(part, state, order, on_iteration=follow, should_stop=should_stop, contexts=contexts)
        tokens[rows], orders[rows], steps[rows] = drawn, taken, commit_steps(taken, order.counts)
    return run.output(tokens, orders, steps, None)


def _require_prefix(known: KnownTokens, prefix_k: int) -> None:
    """Raises ValueError unless a prefix is known as a whole where tokens are known before sampling."""
    num_known = int(known.known[:, :prefix_k].sum(1).min()) if prefix_k else 0
    if num_known < prefix_k:
        raise ValueError(f"known tokens must hold the first {prefix_k} (prefix_k), an image knows {num_known} of these")


def _sample_after_prefix(
    run: SamplingRun, on_iteration: OnIteration | None, should_stop: Callable[[], bool] | None
) -> SampleOutput:
    """The first K tokens, row by row, at constant guidance; then the others, as where these are known."""
    num_prefix, num_tokens, contexts = run.config.prefix_k, math.prod(run.unit_grid), Contexts(run)
    num_left = num_tokens - num_prefix
    first, rest = replace(run, config=run.config.of_prefix), replace(run, config=run.config.of_rest)
    counts = list(range(num_tokens, num_left - 1, -1))
    hooks: dict[str, Any] = {"should_stop": should_stop, "contexts": contexts}
    order = first.own_order(counts)
    tokens, orders, _ = unmask(first, first.start(), order, on_iteration=on_iteration, **hooks)

    def follow(iteration: int, drawn: Tensor) -> Tensor | None:
        return None if on_iteration is None else on_iteration(num_prefix + iteration, drawn)

    if num_left:
        known = (torch.arange(num_tokens, device=tokens.device) < num_prefix).expand(len(tokens), -1)  # [B, L]
        order = rest.own_order(rest.config.masked_counts(num_left), known)
        state = DecodeState(tokens, known, 0, num_left, run.generators)
        tokens, taken, _ = unmask(rest, state, order, on_iteration=follow, **hooks)
        orders = torch.cat([taken[:, :num_left], orders[:, num_left:]], dim=1)  # [B, L]
        counts += order.counts[1:]
    return run.output(tokens, orders, commit_steps(orders, counts), None)
