"""The diffusion head: each token's distribution is a small diffusion model, given the backbone's output for the token.

Parameter names are MAR's (arXiv:2406.11838, section 4.1).

Shape letters: B images, L image tokens, r rows (noisy copies of tokens), M noisy copies of a token, C token channels,
D backbone width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.config import NUM_TRAIN_STEPS
from models.heads.adaln_mlp import SimpleMLPAdaLN
from models.heads.base import Guide
from models.heads.diffusion import add_noise, hybrid_loss, prediction_distance, training_schedule
from models.heads.diffusion_sampler import DiffusionSampler


@dataclass(frozen=True)
class DiffusionNoise:
    """The random part of a loss. timesteps: [r] int64 in 0..999; noise: [r, C] float32."""

    timesteps: Tensor
    noise: Tensor

    def to(self, device: torch.device | str) -> DiffusionNoise:
        return DiffusionNoise(self.timesteps.to(device), self.noise.to(device))


class DiffLoss(nn.Module):
    """The diffusion head, a `TokenHead`: continuous tokens, each denoised by a small network."""

    tables: Tensor

    def __init__(
        self, channels: int, z_channels: int, width: int, depth: int, grad_checkpointing: bool, has_few: bool = False
    ) -> None:
        """has_few: with a network of the same kind that draws in a few evaluations (`few_step.py`)."""
        super().__init__()
        self.channels = channels
        self.z_dim = z_channels
        self.net = SimpleMLPAdaLN(channels, z_channels, width, depth, grad_checkpointing)
        self.few = SimpleMLPAdaLN(channels, z_channels, width, depth, grad_checkpointing) if has_few else None
        tables = training_schedule().tables()
        self.table_names = tuple(tables)
        stacked = torch.stack([torch.tensor(table, dtype=torch.float32) for table in tables.values()])
        self.register_buffer("tables", stacked, persistent=False)  # [8, 1000]

    @property
    def token_dim(self) -> int:
        return self.channels

    def networks(self) -> list[SimpleMLPAdaLN]:
        """Of reverse steps and, where there is one, the few-step head's."""
        return [self.net] if self.few is None else [self.net, self.few]

    def empty_tokens(self, batch_size: int, num_tokens: int, device: torch.device) -> Tensor:
        """Stand-ins for tokens that are not known yet: [B, L, C] float32."""
        return torch.zeros(batch_size, num_tokens, self.channels, device=device)  # [B, L, C]

    def sample_noise(self, num_rows: int, generator: torch.Generator) -> DiffusionNoise:
        """A timestep and a noise for each of r rows, on the generator's device."""
        device = generator.device
        timesteps = torch.randint(0, NUM_TRAIN_STEPS, (num_rows,), generator=generator, device=device)  # [r]
        return DiffusionNoise(timesteps, torch.randn(num_rows, self.channels, generator=generator, device=device))

    def tables_at(self, timesteps: Tensor) -> dict[str, Tensor]:
        """The training schedule's coefficients by name. timesteps: [...] int64; each table is [..., 1] float32."""
        rows = self.tables[:, timesteps, None]  # [8, ..., 1]
        return dict(zip(self.table_names, rows.unbind(0), strict=True))  # each [..., 1]

    def add_noise(self, tokens: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Tokens at timesteps of the training schedule. tokens, noise: [..., C]; timesteps: [...]; gives [..., C]."""
        return add_noise(tokens, noise, self.tables_at(timesteps))  # [..., C]

    def token_loss(self, target: Tensor, z: Tensor, noise: DiffusionNoise) -> Tensor:
        """Loss of each row [r] float32, M copies of all tokens in turn. target: [r / M, C] clean; z: [r / M, D]."""
        tables = self.tables_at(noise.timesteps)  # each [r, 1]
        target = target.float().repeat(len(noise.timesteps) // len(target), 1)  # [r, C]
        x = add_noise(target, noise.noise, tables)  # [r, C]
        output = self.net(x, noise.timesteps, z)  # [r, 2C]
        return hybrid_loss(target, x, noise.noise, output, noise.timesteps, tables)  # [r]

    def prediction(self, target: Tensor, z: Tensor, noise: DiffusionNoise) -> Tensor:
        """eps and variance fraction of each row, [r, 2C]; see `TokenHead`."""
        target = target.float().repeat(len(noise.timesteps) // len(target), 1)  # [r, C]
        return self.net(self.add_noise(target, noise.timesteps, noise.noise), noise.timesteps, z)  # [r, 2C]

    def guided(self, predictions: Tensor, guide: Guide) -> Tensor:
        """Guidance acts on eps; the variance is the full branch's. [G, r, 2C] -> [r, 2C]."""
        eps, fraction = predictions.chunk(2, dim=-1)  # each [G, r, C]
        return torch.cat([guide(eps), fraction[0]], dim=-1)  # [r, 2C]

    def distance(self, prediction: Tensor, wanted: Tensor, noise: DiffusionNoise) -> Tensor:
        """See `prediction_distance`: [r]."""
        return prediction_distance(prediction, wanted, self.tables_at(noise.timesteps))  # [r]

    def sampler(self, cast_head: DiffLoss, compile_mode: str | None) -> DiffusionSampler:
        """See `TokenHead`."""
        networks = (self.net, cast_head.net, cast_head.few)
        return DiffusionSampler(*networks, self.channels, self.tables.device, compile_mode)
