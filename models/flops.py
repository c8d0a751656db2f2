"""FLOPs of an image, counted while the model's own code runs on the meta device: no block's arithmetic stands here.

One multiply-add is two. A pass over the backbone is of second degree in its numbers of tokens, as linears are of first
and attention is of second: three sizes are run, all others follow exactly. The head's rows are independent, and so are
its reverse steps. An image has a caption, boxes and a class label, as far as the model knows them.

Left out: element-wise work, and what a batch needs once, however many its images (the embedded timesteps of a sampler,
what cross-attention gives to images without a caption); rows that a discrete head adds to those of a loss.

Shape letters: G guidance branches, L image tokens, D trunk width, C token channels, n visible tokens, R rows of the
head, Z channels of its condition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor

from models.build import build_model
from models.config import StructMARConfig
from models.context import Context
from models.heads.diffusion_sampler import ReverseOptions
from models.heads.discrete import ROW_MULTIPLE
from models.heads.discrete_sampler import CodeOptions
from models.heads.few_step import FewOptions
from models.masking import num_masked_at
from models.sampling.condition_cache import plan_iterations
from models.sampling.config import SamplingConfig
from models.sampling.guidance import embed_branches
from models.sampling.orders import PlannedOrder
from models.structmar import StructMAR
from util.flops import FlopCounter, count_flops
from util.types import LayoutBatch, TextContext

META = torch.device("meta")

BySize = Callable[..., float]
"""Numbers of tokens -> FLOPs."""


@dataclass(frozen=True)
class PassFlops:
    """backward: gradients of all parameters, and what `grad_checkpointing` runs again."""

    forward: float
    backward: float


def meta_model(config: StructMARConfig) -> StructMAR:
    """A model whose weights have shapes but no numbers, in evaluation mode."""
    with META:
        return build_model(config).eval()


def meta_conditions(config: StructMARConfig, batch_size: int, num_text: int) -> dict[str, Any]:
    """The arguments text, layout and labels of the model's methods. num_text: tokens of a caption."""
    slots = (batch_size, config.max_objects)
    with META:
        boxes, categories = torch.zeros(*slots, 4), torch.zeros(slots, dtype=torch.int64)
        layout = LayoutBatch(boxes, categories, torch.ones(slots, dtype=torch.bool))
        states, valid = torch.zeros(batch_size, num_text, config.text_dim), torch.ones(batch_size, num_text)
        text = TextContext(states, valid.bool(), torch.zeros(batch_size, config.text_dim))
        labels = torch.zeros(batch_size, dtype=torch.int64)
    return {
        "text": text if config.text_dim else None,
        "layout": layout if config.num_categories else None,
        "labels": labels,
    }


def forward_backward(model: StructMAR, run: Callable[[], Tensor]) -> PassFlops:
    """Of `run`, which gives a tensor of the model's, and of the gradients of its sum."""
    with FlopCounter() as counter:
        output = run()
        forward = counter.flops
        output.sum().backward()
    model.zero_grad(set_to_none=True)
    return PassFlops(forward, counter.flops - forward)


class ScoringFlops:
    """Of one image in a pass that can be learned from: conditions, the backbone, some rows of the head."""

    def __init__(self, model: StructMAR, num_text: int) -> None:
        """model: of `meta_model`. num_text: tokens of the caption."""
        config, conditions = model.config, meta_conditions(model.config, 1, num_text)
        tokens = model.head.empty_tokens(1, math.prod(config.unit_grid()), META)  # [1, L, C]

        @lru_cache
        def backbone(num_visible: int) -> PassFlops:
            def run() -> Tensor:
                context = model.prepare(model.embed_conditions(1, **conditions))
                return model.predict(tokens, _ids(1, num_visible), context)  # [1, L, D]

            return forward_backward(model, run)

        self.num_tokens = tokens.shape[1]
        self.row = row_flops(model)
        self.forward = second_degree(lambda n: backbone(n).forward, _half(config))
        self.backward = second_degree(lambda n: backbone(n).backward, _half(config))

    def at(self, num_masked: int, num_rows: int) -> PassFlops:
        """With `num_masked` tokens hidden, and `num_rows` rows of the head."""
        num_visible = self.num_tokens - num_masked
        return PassFlops(
            self.forward(num_visible) + num_rows * self.row.forward,
            self.backward(num_visible) + num_rows * self.row.backward,
        )


def mean_over_masks(
    flops: ScoringFlops, mask_schedule: str, mask_ratio_min: float, num_draws: int, num_quantiles: int = 256
) -> PassFlops:
    """Of one image at the masks that training draws (`masking.mask_ratio`), each hidden token in `num_draws` rows of
    the head: the mean over equally likely masks. Raises ValueError for an unknown schedule."""
    passes = []
    for step in range(num_quantiles):
        uniform = (step + 0.5) / num_quantiles
        num_masked = num_masked_at(mask_schedule, uniform, flops.num_tokens, mask_ratio_min)
        passes.append(flops.at(num_masked, num_draws * num_masked))
    forward, backward = sum(each.forward for each in passes), sum(each.backward for each in passes)
    return PassFlops(forward / num_quantiles, backward / num_quantiles)


def row_flops(model: StructMAR, is_frozen_below: bool = False) -> PassFlops:
    """Of one row of the head, as a share of as many as a discrete head adds up to. is_frozen_below: its condition needs
    no gradient."""
    head, shape = model.head, (ROW_MULTIPLE, model.head.z_dim)
    z = torch.zeros(shape, device=META, requires_grad=not is_frozen_below)  # [R, Z]
    target = head.empty_tokens(1, ROW_MULTIPLE, META)[0]  # [R, C]
    noise = head.sample_noise(ROW_MULTIPLE, torch.Generator()).to(META)
    rows = forward_backward(model, lambda: head.token_loss(target, z, noise))
    return PassFlops(rows.forward / ROW_MULTIPLE, rows.backward / ROW_MULTIPLE)


@torch.no_grad()
def sampling_flops(model: StructMAR, sampling: SamplingConfig, num_text: int) -> float:
    """Of one image of a batch, sampled in float32. model: of `meta_model`; num_text: tokens of the caption."""
    config = model.config

    def prepare(batch_size: int) -> tuple[Context, SamplingConfig, int]:
        conditions = meta_conditions(config, batch_size, num_text)
        branches, used = embed_branches(model, sampling, batch_size, **conditions)
        return model.prepare(branches.conditions, torch.float32), used, len(branches.names)

    (context, used, num_branches), once = count_flops(lambda: prepare(1))
    total: float = count_flops(lambda: prepare(2))[1] - once
    backbone_of = lru_cache(partial(_backbone_flops, model, context))
    token_of = lru_cache(partial(_token_flops, model, context))
    for phase, order in _phases(used, math.prod(config.unit_grid())):
        for iteration, plan in enumerate(plan_iterations(order, phase.branch_uses(num_branches))):
            run = num_branches if plan.use == "run" else 1
            drawn = 1 if plan.use == "full only" else num_branches
            num_asked, num_drawn = plan.asked_ids.shape[1], plan.token_ids.shape[1]
            if not phase.is_blind:
                num_asked = num_drawn = order.counts[iteration]
            total += backbone_of(run)(plan.kept_ids.shape[1], num_asked)
            total += num_drawn * token_of(drawn)(phase.head_options(iteration))
    return total


@torch.no_grad()
def draw_flops(model: StructMAR, sampling: SamplingConfig, num_text: int) -> float:
    """Of drawing one token by the head, with all guidance branches; the backbone apart."""
    branches, _ = embed_branches(model, sampling, 1, **meta_conditions(model.config, 1, num_text))
    context = model.prepare(branches.conditions, torch.float32)
    return _token_flops(model, context, len(branches.names))(sampling.head_options(0))


def _phases(sampling: SamplingConfig, num_tokens: int) -> list[tuple[SamplingConfig, PlannedOrder]]:
    """The prefix, if there is one, and the rest: options, and an order with the numbers of tokens."""
    places = torch.zeros(1, num_tokens, dtype=torch.int64)
    left = num_tokens - sampling.prefix_k
    phases = []
    if sampling.prefix_k:
        phases.append((sampling.of_prefix, PlannedOrder(places, range(num_tokens, left - 1, -1))))
    if left:
        phases.append((sampling.of_rest, PlannedOrder(places, sampling.masked_counts(left))))
    return phases


def _backbone_flops(model: StructMAR, context: Context, num_branches: int) -> BySize:
    """Of a pass over the first branches, by the numbers of visible tokens and of those asked for."""
    context = context.first(num_branches)
    tokens = model.head.empty_tokens(num_branches, math.prod(model.config.unit_grid()), META)  # [G, L, C]

    def count(num_visible: int, num_asked: int) -> float:
        kept_ids, asked_ids = _ids(num_branches, num_visible), _ids(num_branches, num_asked)  # [G, n], [G, p]
        return count_flops(lambda: model.predict(tokens, kept_ids, context, asked_ids))[1]

    if model.config.codes_per_token > 1:  # only the tokens of the codes asked for, and all of them at most
        return lru_cache(lambda num_visible, num_asked: count(0, num_asked))
    return second_degree(count, _half(model.config), _half(model.config))


def _token_flops(
    model: StructMAR, context: Context, num_branches: int
) -> Callable[[ReverseOptions | FewOptions | CodeOptions], float]:
    """Of drawing a token under guidance, by the options of the head."""
    head, z = context.head, torch.zeros(num_branches, 1, model.head.z_dim, device=META)  # [G, 1, Z]
    assert head is not None, "a context for sampling has a head"

    @lru_cache
    def count(options: ReverseOptions | FewOptions | CodeOptions) -> int:
        step = head.at(options)
        noise = step.draw_noise([torch.Generator()], 1).flatten(-3, -2)  # [..., 1, C]
        return count_flops(lambda: step.sample(z, lambda eps: eps[0], noise))[1]

    def flops(options: ReverseOptions | FewOptions | CodeOptions) -> float:
        if isinstance(options, CodeOptions):
            return count(CodeOptions())
        if isinstance(options, FewOptions):
            return count(FewOptions(options.num_evals))
        one, two = count(ReverseOptions(1)), count(ReverseOptions(2))
        return one + (options.num_calls - 1) * (two - one)

    return flops


def second_degree(count: Callable[..., float], *steps: int) -> BySize:
    """The polynomial of second degree that equals `count(*sizes)` where the sizes, in units of their steps, are 0, 1 or
    2 and no more than 2 in all."""

    def at(*axes: int) -> float:
        return count(*(step * axes.count(axis) for axis, step in enumerate(steps)))

    axes, start = range(len(steps)), at()
    slopes = [at(axis) - start for axis in axes]
    bends = {(i, j): at(i, j) - slopes[i] - slopes[j] - start for i, j in combinations_with_replacement(axes, 2)}

    def flops(*sizes: int) -> float:
        x = [Fraction(size, step) for size, step in zip(sizes, steps, strict=True)]
        linear = sum(slope * each for slope, each in zip(slopes, x, strict=True))
        pairs = sum(bend * (x[i] * (x[i] - 1) / 2 if i == j else x[i] * x[j]) for (i, j), bend in bends.items())
        return float(start + linear + pairs)

    return flops


def _ids(batch_size: int, num_tokens: int) -> Tensor:
    """Positions of so many tokens in each image: [B, n] int64."""
    return torch.zeros(batch_size, num_tokens, dtype=torch.int64, device=META)


def _half(config: StructMARConfig) -> int:
    """A step from no token over half of them to all."""
    return max(1, math.prod(config.unit_grid()) // 2)
