"""Clean tokens that the diffusion head predicts from noisy ones in a few steps, with gradients: what the gradient of a
reward of pictures needs of the model.

One pass of the backbone gives every hidden token its condition z. K deterministic steps of the head then lead from the
noise level t of an image to t (K - 1) / K, t (K - 2) / K, ... and to the clean token:

    x0 = clip((x_t - sqrt(1 - bar_t) eps_theta) / sqrt(bar_t)),    x_s = sqrt(bar_s) x0 + sqrt(1 - bar_s) eps_theta.

K = 1 is the one-step prediction. The first of these calls also gives the head's output at a second level for each
token, where it is compared with another model's.

Exact: derivatives of these K steps by all weights. Not what a sampler does: one step from a high t predicts a mean over
all that may come, which is blurry; hidden tokens know nothing of each other; nothing is drawn on the way.

Shape letters: B images, L image tokens, C token channels, D channels of z, m hidden tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.blocks import gather_tokens
from models.structmar import StructMAR
from util.types import LayoutBatch, TextContext


@dataclass(frozen=True)
class NoisyState:
    """Images with hidden tokens, each at a noise level, and everything random about it.

    tokens: [B, L, C] float32, known ones and, where hidden, those that noise is added to; of a (rows, columns) grid.
    kept_ids: [B, L - m], token_ids: [B, m], ascending. timesteps: [B] int64; noise: [B, m, C]. second_timesteps:
    [B, m]; second_noise: [B, m, C], of the second level.
    """

    tokens: Tensor
    kept_ids: Tensor
    token_ids: Tensor
    grid: tuple[int, int]
    text: TextContext | None
    layout: LayoutBatch | None
    timesteps: Tensor
    noise: Tensor
    second_timesteps: Tensor
    second_noise: Tensor

    def hidden(self) -> Tensor:
        """What the hidden tokens are: [B, m, C]."""
        return gather_tokens(self.tokens, self.token_ids)  # [B, m, C]

    def with_tokens(self, tokens: Tensor) -> Tensor:
        """All tokens, with [B, m, C] in the hidden places: [B, L, C]."""
        return self.tokens.scatter(1, self.token_ids[..., None].expand_as(tokens), tokens)  # [B, L, C]


@dataclass(frozen=True)
class CleanPrediction:
    """tokens: [B, m, C] float32, clean. second: [B, m, 2C] float32, noise and variance fraction that are predicted at
    the second level, or None."""

    tokens: Tensor
    second: Tensor | None


class CleanPolicy(nn.Module):
    """A model and the way from noisy to clean tokens behind one `forward`, since wrappers such as DDP act on `forward`
    alone. num_steps: K. clip_x0: bound of the predicted tokens, None for none. has_second: whether the second level is
    looked at.

    Raises ValueError for a head of codes, which has no such gradients.
    """

    def __init__(self, model: StructMAR, num_steps: int, clip_x0: float | None, has_second: bool) -> None:
        super().__init__()
        if model.config.head != "diffusion":
            raise ValueError(f"codes have no gradient of a reward: the model has the {model.config.head} head")
        self.model, self.num_steps, self.clip_x0, self.has_second = model, num_steps, clip_x0, has_second

    def forward(self, state: NoisyState) -> CleanPrediction:
        """The model must be in eval mode."""
        model, head = self.model, self.model.diffloss
        assert not model.training, "predictions need model.eval()"
        z = model.token_conditions(
            state.tokens, state.kept_ids, state.token_ids, text=state.text, layout=state.layout, grid=state.grid
        )  # [B, m, D]
        target = state.hidden()  # [B, m, C]
        timesteps = state.timesteps[:, None].expand_as(state.token_ids)  # [B, m]
        noisy = head.add_noise(target, timesteps, state.noise)  # [B, m, C]
        eps, at_second = self._first(state, noisy, timesteps, z)  # [B, m, C], [B, m, 2C] or None
        clean = self._clean(noisy, timesteps, eps)  # [B, m, C]
        for step in range(1, self.num_steps):
            timesteps = (state.timesteps * (self.num_steps - step) // self.num_steps)[:, None].expand_as(timesteps)
            noisy = head.add_noise(clean, timesteps, eps)  # [B, m, C]
            eps = self._eps(noisy, timesteps, z)  # [B, m, C]
            clean = self._clean(noisy, timesteps, eps)  # [B, m, C]
        return CleanPrediction(clean, at_second)

    def _first(self, state: NoisyState, noisy: Tensor, timesteps: Tensor, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """eps [B, m, C], and the output at the second level [B, m, 2C], in one call. noisy: [B, m, C]; timesteps:
        [B, m]; z: [B, m, D]."""
        if not self.has_second:
            return self._eps(noisy, timesteps, z), None  # [B, m, C]
        second = self.model.diffloss.add_noise(state.hidden(), state.second_timesteps, state.second_noise)  # [B, m, C]
        outputs = self._outputs(
            torch.stack([noisy, second], dim=2),
            torch.stack([timesteps, state.second_timesteps], dim=2),
            z[:, :, None].expand(-1, -1, 2, -1),
        )  # [B, m, 2, 2C]
        return outputs[:, :, 0].chunk(2, dim=-1)[0], outputs[:, :, 1]  # [B, m, C], [B, m, 2C]

    def _eps(self, noisy: Tensor, timesteps: Tensor, z: Tensor) -> Tensor:
        return self._outputs(noisy, timesteps, z).chunk(2, dim=-1)[0]  # [..., C]

    def _outputs(self, noisy: Tensor, timesteps: Tensor, z: Tensor) -> Tensor:
        """noisy: [..., C]; timesteps: [...]; z: [..., D]; gives [..., 2C] in the dtype of `noisy`."""
        rows = self.model.diffloss.net(noisy.flatten(0, -2), timesteps.flatten(), z.flatten(0, -2))  # [r, 2C]
        return rows.to(noisy.dtype).unflatten(0, noisy.shape[:-1])  # [..., 2C]

    def _clean(self, noisy: Tensor, timesteps: Tensor, eps: Tensor) -> Tensor:
        """The token [B, m, C] that a noise means."""
        tables = self.model.diffloss.tables_at(timesteps)  # each [B, m, 1]
        clean = tables["x0_from_x"] * noisy - tables["x0_from_eps"] * eps  # [B, m, C]
        return clean if self.clip_x0 is None else clean.clamp(-self.clip_x0, self.clip_x0)  # [B, m, C]


def output_at_second(model: StructMAR, state: NoisyState) -> Tensor:
    """What another model's head says at the second level: [B, m, 2C] float32."""
    noisy = model.diffloss.add_noise(state.hidden(), state.second_timesteps, state.second_noise)  # [B, m, C]
    output = model.denoise(
        state.tokens,
        state.kept_ids,
        state.token_ids,
        noisy[:, :, None],
        state.second_timesteps[..., None],
        text=state.text,
        layout=state.layout,
        grid=state.grid,
    )  # [B, m, 1, 2C]
    return output[:, :, 0].float()  # [B, m, 2C]
