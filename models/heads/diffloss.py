"""The per-token diffusion head: an MLP with adaptive layer norm, conditioned on the backbone's output for the token.

Parameter names are MAR's (arXiv:2406.11838, section 4.1).

Shape letters: r rows (draws of tokens), M draws of a token, C token channels, D backbone width, W head width,
S timesteps, G guidance branches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.heads.diffusion import NUM_TRAIN_STEPS, add_noise, hybrid_loss, training_schedule

TIME_FREQUENCIES = 256
MAX_PERIOD = 10000.0


@dataclass(frozen=True)
class DiffusionDraws:
    """The random part of a loss. timesteps: [r] int64 in 0..999; noise: [r, C] float32."""

    timesteps: Tensor
    noise: Tensor

    def to(self, device: torch.device | str) -> DiffusionDraws:
        return DiffusionDraws(self.timesteps.to(device), self.noise.to(device))


def sample_draws(num_rows: int, channels: int, generator: torch.Generator) -> DiffusionDraws:
    device = generator.device
    timesteps = torch.randint(0, NUM_TRAIN_STEPS, (num_rows,), generator=generator, device=device)  # [r]
    return DiffusionDraws(timesteps, torch.randn(num_rows, channels, generator=generator, device=device))


def timestep_features(timesteps: Tensor) -> Tensor:
    """cos and sin of t at 128 frequencies from 1 to 1/10000. [r] -> [r, 256] float32."""
    half = TIME_FREQUENCIES // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half  # [128]
    angles = timesteps[:, None].float() * torch.exp(-math.log(MAX_PERIOD) * exponents)  # [r, 128]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # [r, 256]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift  # [r, W]


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
    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(condition).chunk(3, dim=-1)  # each [r, W]
        return x + gate * self.mlp(modulate(self.in_ln(x), shift, scale))  # [r, W]

    def modulated(self, x: Tensor, modulation: Tensor) -> Tensor:
        """`forward` with few kernels. x: [..., r, W]; modulation: [..., r, 3W]: shift, 1 + scale, gate."""
        shift, scale, gate = modulation.chunk(3, dim=-1)  # each [..., r, W]
        return torch.addcmul(x, gate, self.mlp(torch.addcmul(shift, scale, self.in_ln(x))))  # [..., r, W]


class FinalLayer(nn.Module):
    def __init__(self, width: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)  # each [r, W]
        return self.linear(modulate(self.norm_final(x), shift, scale))  # [r, 2C]

    def modulated(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x: [..., r, W]; modulation: [..., r, 2W]: shift, 1 + scale; returns [..., r, 2C]."""
        shift, scale = modulation.chunk(2, dim=-1)  # each [..., r, W]
        x = torch.addcmul(shift, scale, self.norm_final(x))  # [..., r, W]
        return self.linear(x.to(self.linear.weight.dtype))  # [..., r, 2C]


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
        x = self.input_proj(x)  # [r, W]
        for block in self.res_blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, condition, use_reentrant=False)  # [r, W]
            else:
                x = block(x, condition)  # [r, W]
        return self.final_layer(x, condition)  # [r, 2C]

    def embed_times(self, timesteps: Tensor) -> Tensor:
        """`time_embed`, of each timestep once if there are more rows than timesteps. [r] -> [r, W]."""
        if len(timesteps) <= NUM_TRAIN_STEPS:
            return self.time_embed(timesteps)  # [r, W]
        table = self.time_embed(torch.arange(NUM_TRAIN_STEPS, device=timesteps.device))  # [1000, W]
        return F.embedding(timesteps, table.float())  # [r, W], in float32: its backward pass adds up rows

    def modulations(self, times: Tensor, embedded: Tensor) -> list[Tensor]:
        """What adaLN says in each block and in the last layer, at several timesteps: it does not depend on x.

        times: [S, W], of `time_embed`; embedded: [G, r, W], of `cond_embed`; both float32. Gives shift, 1 + scale and
        gate of each block, [S, G, r, 3W], then shift and 1 + scale, [S, G, r, 2W].
        """
        layers = [module.adaLN_modulation[1] for module in (*self.res_blocks, self.final_layer)]
        condition = F.silu(times[:, None, None] + embedded).to(layers[0].weight.dtype)  # [S, G, r, W]
        every = [layer(condition) for layer in layers]  # each [S, G, r, .]
        for modulation in every:
            modulation.chunk(modulation.shape[-1] // embedded.shape[-1], dim=-1)[1].add_(1)  # [S, G, r, W]
        return every

    def modulated(self, x: Tensor, modulations: Sequence[Tensor]) -> Tensor:
        """The network at one timestep, given `modulations` at it. x: [r, C] float32; returns [..., r, 2C]."""
        x = self.input_proj(x).to(modulations[0].dtype)  # [r, W]
        for block, modulation in zip(cast(list[ResBlock], self.res_blocks), modulations[:-1], strict=True):
            x = block.modulated(x, modulation)  # [..., r, W]
        return self.final_layer.modulated(x, modulations[-1])  # [..., r, 2C]


class DiffLoss(nn.Module):
    """The head and its training objective."""

    tables: Tensor

    def __init__(self, channels: int, z_channels: int, width: int, depth: int, grad_checkpointing: bool) -> None:
        super().__init__()
        self.channels = channels
        self.net = SimpleMLPAdaLN(channels, z_channels, width, depth, grad_checkpointing)
        tables = training_schedule().tables()
        self.table_names = tuple(tables)
        stacked = torch.stack([torch.tensor(table, dtype=torch.float32) for table in tables.values()])
        self.register_buffer("tables", stacked, persistent=False)  # [8, 1000]

    def tables_at(self, timesteps: Tensor) -> dict[str, Tensor]:
        """The training schedule's coefficients by name. timesteps: [...] int64; each table is [..., 1] float32."""
        rows = self.tables[:, timesteps, None]  # [8, ..., 1]
        return dict(zip(self.table_names, rows.unbind(0), strict=True))  # each [..., 1]

    def token_loss(self, target: Tensor, z: Tensor, draws: DiffusionDraws) -> Tensor:
        """Loss of each draw [r] float32, M copies of all tokens in turn. target: [r / M, C] clean; z: [r / M, D]."""
        tables = self.tables_at(draws.timesteps)  # each [r, 1]
        target = target.float().repeat(len(draws.timesteps) // len(target), 1)  # [r, C]
        x = add_noise(target, draws.noise, tables)  # [r, C]
        output = self.net(x, draws.timesteps, z)  # [r, 2C]
        return hybrid_loss(target, x, draws.noise, output, draws.timesteps, tables)  # [r]
