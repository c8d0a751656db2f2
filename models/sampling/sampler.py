"""Sampling: uncover tokens in some order, each drawn by the diffusion head, with guidance by text and layout.

Per iteration: one pass of the backbone per guidance branch (`condition_cache.py` leaves some out), then the reverse
process of the tokens to uncover. Guidance combines the branches' noise predictions,

    eps = eps_0 + w_text (eps_text - eps_0) + w_layout (eps_text+layout - eps_text),

of which only the branches with a weight are computed. Every image draws from its own generator, so that it does not
depend on its batch. The networks may run in bfloat16, but for the first reverse step (`models/heads/diffusion.py` says
why); all else is float32.

Shape letters: B images, G guidance branches, L image tokens, K buffer slots, D width, C token channels,
S reverse steps, r rows (tokens), p tokens uncovered in one iteration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.conditioning import Conditions
from models.heads.diffusion import ReverseStep, normal_log_prob, reverse_steps
from models.masking import cosine_masked_counts, draw_orders
from models.sampling.condition_cache import GuidedBackbone, iteration_ids, plan_passes
from models.sampling.config import SamplingConfig, guidance_scales
from models.sampling.prepared import Head, prepare
from models.structmar import StructMAR
from util.types import LayoutBatch, TextContext

__all__ = [
    "Branches",
    "NoiseSource",
    "SampleOutput",
    "SamplingConfig",
    "Trace",
    "choose_branches",
    "combine_branches",
    "embed_branches",
    "embed_times",
    "empty_trace",
    "guidance_scales",
    "head_modulations",
    "iteration_ids",
    "reverse_process",
    "sample",
    "uncover",
    "write_trace",
]
NoiseSource = Callable[[int, int, int], Tensor]
MODULATED_ROWS = 512  # rows of the head's adaLN computed at once: enough for fast matmuls, little memory


@dataclass(frozen=True)
class Trace:
    """What the reverse processes went through, by token position.

    states: [B, L, S + 1, C] float32, the starting noise first, then the token after reverse step 0, 1, ... (noisiest
    first). log_probs: [B, L, S] float32, of the draw of each reverse step; 0 at the last one, which draws nothing.
    """

    states: Tensor
    log_probs: Tensor


@dataclass(frozen=True)
class SampleOutput:
    """latents: [B, C, h, w], scaled. orders: [B, L], each image's order (uncovered from its end). trace: or None."""

    latents: Tensor
    orders: Tensor
    trace: Trace | None = None


@dataclass(frozen=True)
class Branches:
    """The guidance branches' conditions, stacked branch by branch along the batch, and how to combine them.

    names: which of full, text, null are there, in that order. num_with_text: rows with a caption; they come first.
    """

    names: tuple[str, ...]
    conditions: Conditions
    num_with_text: int

    def combine(self, eps: Tensor, w_text: float, w_layout: float) -> Tensor:
        """eps: [G, r, C], a prediction per branch (or [1, r, C], of the full one alone); returns the guided [r, C]."""
        return combine_branches(dict(zip(self.names[: len(eps)], eps.unbind(0), strict=True)), w_text, w_layout)


def combine_branches(eps: Mapping[str, Tensor], w_text: float, w_layout: float) -> Tensor:
    """eps: the prediction of each branch that is there, each [..., C]; returns the guided [..., C]."""
    full = eps["full"]  # [..., C]
    if len(eps) == 1:
        return full
    if "text" not in eps:
        return torch.lerp(eps["null"], full, w_text)  # [..., C]
    text = eps["text"]  # [..., C]
    if "null" not in eps:
        return torch.lerp(text, full, w_layout)  # [..., C]
    return torch.lerp(eps["null"], text, w_text).add(full - text, alpha=w_layout)  # [..., C]


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
) -> tuple[Branches, SamplingConfig]:
    """Embeds the branches of `choose_branches`, and gives its config."""
    has_text = text is not None or labels is not None
    names, config = choose_branches(config, has_text, layout is not None)
    parts = {"full": model.embed_conditions(batch_size, labels, text, layout)}
    if "text" in names:
        parts["text"] = model.embed_conditions(batch_size, labels, text, None)
    if "null" in names:
        parts["null"] = model.embed_conditions(batch_size)
    num_with_text = 0 if text is None else batch_size * sum(name != "null" for name in names)
    return Branches(names, stack_conditions([parts[name] for name in names]), num_with_text), config


def stack_conditions(parts: Sequence[Conditions]) -> Conditions:
    """Concatenates along the batch; shorter texts are padded, missing biases are zero."""
    first = parts[0]
    bias = None
    if any(part.layout_bias is not None for part in parts):
        known = next(part.layout_bias for part in parts if part.layout_bias is not None)
        bias = torch.cat([torch.zeros_like(known) if p.layout_bias is None else p.layout_bias for p in parts])
    text = text_valid = None
    if first.text is not None and first.text_valid is not None:
        length = max(part.text.shape[1] for part in parts if part.text is not None)
        text = torch.cat([_pad_rows(part.text, length) for part in parts if part.text is not None])
        text_valid = torch.cat([_pad_rows(part.text_valid, length) for part in parts if part.text_valid is not None])
    tokens = None
    if first.layout_tokens is not None:
        tokens = torch.cat([part.layout_tokens for part in parts if part.layout_tokens is not None])
    return Conditions(torch.cat([part.base for part in parts]), tokens, bias, text, text_valid)


def _pad_rows(x: Tensor, length: int) -> Tensor:
    """Pads dimension 1 with zeros (False)."""
    return torch.cat([x, x.new_zeros(x.shape[0], length - x.shape[1], *x.shape[2:])], dim=1)


def reverse_process(
    head: Head,
    z: Tensor,
    times: Tensor,
    branches: Branches,
    scales: tuple[float, float],
    noise: Tensor,
    config: SamplingConfig,
    record: list[tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Draws r tokens. z: [G, r, D]; noise: [S + 1, r, C], the start and one per reverse step; gives [r, C] float32.

    The network may run in another dtype; the state, the guidance and every coefficient stay in float32, and so does the
    whole first step. times: `embed_times`. record: gets, per reverse step, the state after it [r, C] and the
    log-probability of its draw [r].
    """
    steps = reverse_steps(config.num_sampling_steps, config.t_max)
    x = noise[0]  # [r, C]
    for index, (step, modulations) in enumerate(zip(steps, head_modulations(head, z, times), strict=True)):
        eps, fraction = head.output(index, x, modulations).chunk(2, dim=-1)  # each [G, r, C]
        guided = branches.combine(eps, *scales)  # [r, C]
        before = x  # [r, C]
        x = step(x, guided, fraction[0], noise[index + 1], config.temperature, config.clip_x0)  # [r, C]
        if record is not None:
            record.append((x, _drawn_log_prob(step, before, guided, fraction[0], x, config)))
    return x


def embed_times(model: StructMAR, config: SamplingConfig, device: torch.device) -> Tensor:
    """The head's embedding of the timestep of each reverse step: [S, W] float32."""
    steps = reverse_steps(config.num_sampling_steps, config.t_max)
    return model.diffloss.net.time_embed(torch.tensor([step.timestep for step in steps], device=device))  # [S, W]


def head_modulations(head: Head, z: Tensor, times: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """`SimpleMLPAdaLN.modulations` of each reverse step in turn: [G, r, 3W] per block, then [G, r, 2W].

    They do not depend on the noisy tokens, so many steps are computed at once. z: [G, r, D]; times: [S, W].
    """
    embedded = head.first.cond_embed(z)  # [G, r, W]
    yield tuple(layer[0] for layer in head.first.modulations(times[:1], embedded))
    for chunk in times[1:].split(max(1, MODULATED_ROWS // z[..., 0].numel())):
        yield from zip(*head.net.modulations(chunk, embedded), strict=True)  # S' of each [S', G, r, .]


def _drawn_log_prob(
    step: ReverseStep, before: Tensor, eps: Tensor, fraction: Tensor, after: Tensor, config: SamplingConfig
) -> Tensor:
    """Of one reverse step from `before` to `after`; all [r, C]; gives [r], 0 for the last step."""
    if step.is_last:
        return after.new_zeros(len(after))  # [r]
    mean, log_variance = step.distribution(before, eps, fraction, config.clip_x0)  # each [r, C]
    return normal_log_prob(after, mean, 0.5 * log_variance + math.log(config.temperature))  # [r]


def uncover(
    model: StructMAR,
    branches: Branches,
    orders: Tensor,
    noise: NoiseSource,
    config: SamplingConfig,
    progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
    trace: Trace | None = None,
    dtype: torch.dtype = torch.float32,
    on_iteration: Callable[[int, Tensor], Tensor | None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Tensor:
    """The loop. orders: [B, L]; noise(iteration, S + 1, p) gives [S + 1, B, p, C]; returns tokens [B, L, C] float32.

    trace: filled in place if given (`empty_trace`). dtype: of the networks (`models/sampling/prepared.py`).
    """
    batch_size, num_tokens = orders.shape
    counts = cosine_masked_counts(num_tokens, config.num_iter)
    # Everything that needs the host or does not depend on the tokens comes before the loop, which only queues kernels.
    num_branches = len(branches.names)
    passes = plan_passes(orders, counts, config.branch_uses(num_branches))
    options = [config.at(iteration) for iteration in range(config.num_iter)]
    times = {at: embed_times(model, at, orders.device) for at in set(options)}  # [S, W] each
    tape = [
        noise(iteration, len(times[at]) + 1, step.token_ids.shape[1]).flatten(1, 2)  # [S + 1, B * p, C]
        for iteration, (step, at) in enumerate(zip(passes, options, strict=True))
    ]
    prepared = prepare(model, branches.conditions, branches.num_with_text, dtype)
    backbone = GuidedBackbone(prepared, num_branches, passes)
    tokens = torch.zeros(batch_size, num_tokens, model.config.token_dim, device=orders.device)  # [B, L, C]
    iterations: Iterable[int] = range(config.num_iter)
    for iteration in iterations if progress is None else progress(iterations):
        if should_stop is not None and should_stop():
            break
        step, at, draws = passes[iteration], options[iteration], tape[iteration]
        z = backbone(tokens, step).flatten(1, 2)  # [G, B * p, D]
        scales = guidance_scales(config, num_tokens, counts[iteration + 1])
        record: list[tuple[Tensor, Tensor]] | None = None if trace is None else []
        drawn = reverse_process(prepared.head, z, times[at], branches, scales, draws, at, record)  # [B * p, C]
        if trace is not None and record is not None:
            write_trace(trace, step.token_ids, draws[0], record)
        drawn = drawn.unflatten(0, (batch_size, -1))  # [B, p, C]
        tokens = tokens.scatter(1, step.token_ids[..., None].expand_as(drawn), drawn)  # [B, L, C]
        replaced = None if on_iteration is None else on_iteration(iteration, tokens)
        tokens = tokens if replaced is None else replaced  # [B, L, C]
    return tokens


def empty_trace(orders: Tensor, channels: int, config: SamplingConfig) -> Trace:
    """Room for the reverse processes of the images of `orders` [B, L]. Raises ValueError for what cannot be scored."""
    config.require_traceable()
    num_steps = len(reverse_steps(config.num_sampling_steps, config.t_max))
    states = torch.zeros(*orders.shape, num_steps + 1, channels, device=orders.device)  # [B, L, S + 1, C]
    return Trace(states, torch.zeros(*orders.shape, num_steps, device=orders.device))


def write_trace(trace: Trace, token_ids: Tensor, start: Tensor, record: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Puts one iteration's tokens in their places. token_ids: [B, p]; start: [B * p, C]; record: S pairs."""
    shape = token_ids.shape
    states = torch.stack([start, *(state for state, _ in record)], dim=1).unflatten(0, shape)  # [B, p, S + 1, C]
    log_probs = torch.stack([log_prob for _, log_prob in record], dim=1).unflatten(0, shape)  # [B, p, S]
    trace.states.scatter_(1, token_ids[..., None, None].expand_as(states), states)
    trace.log_probs.scatter_(1, token_ids[..., None].expand_as(log_probs), log_probs)


@torch.no_grad()
def sample(
    model: StructMAR,
    config: SamplingConfig,
    generators: Sequence[torch.Generator],
    text: TextContext | None = None,
    layout: LayoutBatch | None = None,
    labels: Tensor | None = None,
    on_iteration: Callable[[int, Tensor], Tensor | None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    record: bool = False,
    dtype: torch.dtype = torch.float32,
) -> SampleOutput:
    """Samples one image per generator. The model must be in eval mode; conditions lie on its device, [B, ...].

    on_iteration: gets each iteration and the tokens [B, L, C] after it, and may return others. should_stop: asked
    before each iteration; where it ends, unknown tokens are zero. record: keeps the reverse processes. dtype: of the
    networks' weights and matrix products; the model's are float32.
    Raises ValueError if the number of images disagrees, num_iter exceeds the number of tokens, or a recording is wanted
    where it cannot be scored (`SamplingConfig.require_traceable`).
    """
    batch_size = len(generators)
    for name, given in (("text", text), ("layout", layout), ("labels", labels)):
        if given is not None and len(given) != batch_size:
            raise ValueError(f"{name} is for {len(given)} images, but there are {batch_size} generators")
    assert not model.training, "sampling needs model.eval()"
    device = model.fake_latent.device
    orders = draw_orders(config.order, batch_size, model.config.grid, generators).to(device)  # [B, L]
    trace = empty_trace(orders, model.config.token_dim, config) if record else None

    def noise(_iteration: int, num_draws: int, num_tokens: int) -> Tensor:
        shape = (num_draws, num_tokens, model.config.token_dim)
        return torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generators], dim=1).to(device)

    branches, config = embed_branches(model, config, batch_size, text, layout, labels)
    tokens = uncover(model, branches, orders, noise, config, None, trace, dtype, on_iteration, should_stop)  # [B, L, C]
    return SampleOutput(model.unpatchify(tokens), orders, trace)
