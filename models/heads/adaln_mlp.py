"""The network of the diffusion head: an MLP with adaptive layer norm (adaLN), conditioned on the backbone's output.

One function, `run`, serves training, where every layer computes its modulation from its own condition, and sampling,
where modulations of many steps are computed at once. Parameter names are MAR's (arXiv:2406.11838, section 4.1).

Shape letters: r rows (noisy copies of tokens), M noisy copies of a token, C token channels, D backbone width, W head
width, S timesteps, G guidance branches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.config import NUM_TRAIN_STEPS

TIME_FREQUENCIES = 256
MAX_PERIOD = 10000.0


def timestep_features(timesteps: Tensor) -> Tensor:
    """cos and sin of t at 128 frequencies from 1 to 1/10000. [r] -> [r, 256] float32."""
    half = TIME_FREQUENCIES // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half  # [128]
    angles = timesteps[:, None].float() * torch.exp(-math.log(MAX_PERIOD) * exponents)  # [r, 128]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # [r, 256]


def multiply_add(x: Tensor, factor: Tensor, value: Tensor) -> Tensor:
    """x + factor * value, rounded after the product and after the sum: what MAR trains with."""
    return x + factor * value  # [r, W]


Modulation = tuple[Tensor, ...]
"""What adaLN says in one layer: shift, 1 + scale and, in blocks, gate; each [..., r, W]."""
MultiplyAdd = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x, factor, value) -> x + factor * value: `multiply_add`, or `torch.addcmul`, one kernel that rounds once."""


def one_plus_scale(output: Tensor, num_parts: int) -> Modulation:
    """adaLN's output, [..., r, num_parts * W]: shift, scale, and gate where there are three."""
    shift, scale, *gate = output.chunk(num_parts, dim=-1)  # each [..., r, W]
    return shift, 1 + scale, *gate  # each [..., r, W]


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def initialize(self) -> None:
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, timesteps: Tensor) -> Tensor:
        return self.mlp(timestep_features(timesteps))  # [r, W]


class ResBlock(nn.Module):
    NUM_PARTS = 3  # of its modulation

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, self.NUM_PARTS * width))

    def modulation(self, condition: Tensor) -> Modulation:
        """[r, W] -> shift, 1 + scale, gate, each [r, W]."""
        return one_plus_scale(self.adaLN_modulation(condition), self.NUM_PARTS)

    def forward(self, x: Tensor, modulation: Modulation, add: MultiplyAdd = multiply_add) -> Tensor:
        """x: [..., r, W]."""
        shift, scale, gate = modulation  # each [..., r, W]
        return add(x, gate, self.mlp(add(shift, scale, self.in_ln(x))))  # [..., r, W]


class FinalLayer(nn.Module):
    NUM_PARTS = 2  # of its modulation

    def __init__(self, width: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, self.NUM_PARTS * width))

    def modulation(self, condition: Tensor) -> Modulation:
        """[r, W] -> shift, 1 + scale, each [r, W]."""
        return one_plus_scale(self.adaLN_modulation(condition), self.NUM_PARTS)

    def forward(self, x: Tensor, modulation: Modulation, add: MultiplyAdd = multiply_add) -> Tensor:
        """x: [..., r, W]; returns [..., r, 2C]."""
        shift, scale = modulation  # each [..., r, W]
        return self.linear(add(shift, scale, self.norm_final(x)))  # [..., r, 2C]


class SimpleMLPAdaLN(nn.Module):
    """Predicts eps and the variance fraction of noisy tokens."""

    def __init__(self, channels: int, z_channels: int, width: int, depth: int, grad_checkpointing: bool) -> None:
        super().__init__()
        self.grad_checkpointing = grad_checkpointing
        self.time_embed = TimestepEmbedder(width)
        self.cond_embed = nn.Linear(z_channels, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * channels)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.time_embed.initialize()
        modulations = [module.adaLN_modulation[1] for module in (*self.res_blocks, self.final_layer)]
        for layer in (*modulations, self.final_layer.linear):
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, timesteps: Tensor, z: Tensor) -> Tensor:
        """x: [r, C] noisy tokens, M copies of all in turn; timesteps: [r]; z: [r / M, D]; returns [r, 2C]."""
        embedded = self.cond_embed(z).repeat(len(x) // len(z), 1)  # [r, W]
        condition = self.embed_times(timesteps).to(embedded.dtype) + embedded  # [r, W]
        layers = self.layers()
        return self.run(x, lambda index: layers[index].modulation(condition))  # [r, 2C]

    def modulated(self, x: Tensor, modulations: Sequence[Modulation]) -> Tensor:
        """The network at one timestep, given `modulations` at it. x: [r, C] float32; returns [..., r, 2C]."""
        return self.run(x, modulations.__getitem__, torch.addcmul, modulations[0][0].dtype)  # [..., r, 2C]

    def run(
        self,
        x: Tensor,
        modulation_at: Callable[[int], Modulation],
        add: MultiplyAdd = multiply_add,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The network. modulation_at: of each of `layers`; dtype: of the blocks, None: x's. [r, C] -> [..., r, 2C]."""
        x = self.input_proj(x)  # [r, W]
        x = x if dtype is None else x.to(dtype)  # [r, W]
        *blocks, last = self.layers()
        for index, block in enumerate(blocks):
            layer = partial(_run_layer, block, index, modulation_at, add)
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, use_reentrant=False)  # [..., r, W]
            else:
                x = layer(x)  # [..., r, W]
        return last(x, modulation_at(len(blocks)), add)  # [..., r, 2C]

    def layers(self) -> list[ResBlock | FinalLayer]:
        """Those with a modulation: the blocks, then the last layer."""
        return [*cast(list[ResBlock], self.res_blocks), self.final_layer]

    def embed_times(self, timesteps: Tensor) -> Tensor:
        """`time_embed`, of each timestep once if there are more rows than timesteps. [r] -> [r, W]."""
        if len(timesteps) <= NUM_TRAIN_STEPS:
            return self.time_embed(timesteps)  # [r, W]
        table = self.time_embed(torch.arange(NUM_TRAIN_STEPS, device=timesteps.device))  # [1000, W]
        return F.embedding(timesteps, table.float())  # [r, W], in float32: its backward pass adds up rows

    def modulations(self, times: Tensor, embedded: Tensor) -> list[Modulation]:
        """What adaLN says in each layer at several timesteps at once: it does not depend on x.

        times: [S, W], of `time_embed`; embedded: [G, r, W], of `cond_embed`; both float32. Each part is [S, G, r, W].
        """
        layers = self.layers()
        linears = [cast(nn.Linear, layer.adaLN_modulation[1]) for layer in layers]
        condition = F.silu(times[:, None, None] + embedded).to(linears[0].weight.dtype)  # [S, G, r, W]
        pairs = zip(layers, linears, strict=True)
        return [one_plus_scale(linear(condition), layer.NUM_PARTS) for layer, linear in pairs]


def _run_layer(
    layer: ResBlock | FinalLayer,
    index: int,
    modulation_at: Callable[[int], Modulation],
    add: MultiplyAdd,
    x: Tensor,
) -> Tensor:
    return layer(x, modulation_at(index), add)  # [..., r, W]
