"""Drawing tokens from the diffusion head: the reverse process under guidance, and what it leaves for policy gradients.

Guidance acts on the noise prediction. The network may run in bfloat16, but for the first reverse step, where rounding
costs most (`diffusion.py`); the state, the guidance and every coefficient are float32.

Shape letters: B images, G guidance branches, L image tokens, D backbone width, C token channels, S reverse steps,
r rows (tokens), p tokens drawn in one iteration, W head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.compiled import compiled
from models.heads.adaln_mlp import Modulation, SimpleMLPAdaLN
from models.heads.base import Guide, HeadOutput, HeadStep
from models.heads.diffusion import ReverseStep, normal_log_prob, reverse_steps
from models.heads.few_step import FewOptions, FewStep

MODULATED_ROWS = 512  # rows of adaLN computed at once: enough for fast matmuls, little memory

Record = Sequence[tuple[Tensor, Tensor]]
"""The start, with zeros, then per reverse step the state after it [r, C] and the log-probability of its draw [r]."""


@dataclass(frozen=True)
class ReverseOptions:
    """num_steps: reverse steps per token; t_max: timesteps above it are clipped to it; temperature: factor on the noise
    of each step; clip_x0: bound of predicted tokens."""

    num_steps: int
    t_max: int | None = None
    temperature: float = 1.0
    clip_x0: float | None = None

    @property
    def steps(self) -> tuple[ReverseStep, ...]:
        return reverse_steps(self.num_steps, self.t_max)

    @property
    def num_calls(self) -> int:
        """How often the head runs for a token: once in each step that is left once those above t_max are merged."""
        return len(self.steps)


@dataclass(frozen=True)
class Trace:
    """What the reverse processes went through, by token position.

    states: [B, L, S + 1, C] float32, the starting noise first, then the token after reverse step 0, 1, ... (noisiest
    first). log_probs: [B, L, S] float32, of the draw of each reverse step; 0 at the last one, which draws nothing.
    """

    states: Tensor
    log_probs: Tensor

    def write(self, token_ids: Tensor, record: Record) -> None:
        """Puts one iteration's tokens in their places. token_ids: [B, p]; record: S + 1 pairs."""
        shape = token_ids.shape
        states = torch.stack([state for state, _ in record], dim=1).unflatten(0, shape)  # [B, p, S + 1, C]
        log_probs = torch.stack([log_prob for _, log_prob in record[1:]], dim=1).unflatten(0, shape)  # [B, p, S]
        self.states.scatter_(1, token_ids[..., None, None].expand_as(states), states)
        self.log_probs.scatter_(1, token_ids[..., None].expand_as(log_probs), log_probs)


@dataclass(frozen=True)
class DiffusionSampler:
    """A `HeadSampler`. first: the network of the first reverse step, in float32; net: of all others, on `device`; few:
    the few-step head's, which draws where the options are `FewOptions`; None without one."""

    first: SimpleMLPAdaLN
    net: SimpleMLPAdaLN
    few: SimpleMLPAdaLN | None
    channels: int
    device: torch.device
    compile_mode: str | None = None

    @property
    def has_confidence(self) -> bool:
        return False

    @property
    def has_grid_noise(self) -> bool:
        return False

    def at(self, options: ReverseOptions | FewOptions) -> HeadStep:
        """See `HeadSampler`."""
        if isinstance(options, FewOptions):
            assert self.few is not None, "the options are checked against the model's config (models/sampling/few.py)"
            return FewStep(self.few, options, self.channels, self.device, self.compile_mode)
        timesteps = torch.tensor([step.timestep for step in options.steps], device=self.device)  # [S]
        return DiffusionStep(self, options, self.first.time_embed(timesteps))

    def empty_trace(self, batch_size: int, num_tokens: int, options: ReverseOptions, device: torch.device) -> Trace:
        """Room for the reverse processes of all tokens."""
        shape = (batch_size, num_tokens, len(options.steps))
        states = torch.zeros(*shape[:2], shape[2] + 1, self.channels, device=device)  # [B, L, S + 1, C]
        return Trace(states, torch.zeros(shape, device=device))

    def output(self, index: int, x: Tensor, modulations: Sequence[Modulation]) -> Tensor:
        """Of reverse step `index` (0: the first). x: [r, C]; modulations: parts [G, r, W] per layer; [G, r, 2C]."""
        net = self.first if index == 0 else self.net
        if self.compile_mode is None:
            return net.modulated(x, modulations)  # [G, r, 2C]
        return compiled(SimpleMLPAdaLN.modulated, self.compile_mode)(net, x, modulations)  # [G, r, 2C]

    def modulations(self, z: Tensor, times: Tensor) -> Iterator[list[Modulation]]:
        """`SimpleMLPAdaLN.modulations` of each reverse step in turn, parts [G, r, W] per layer.

        They do not depend on the noisy tokens, so many steps are computed at once. z: [G, r, D]; times: [S, W].
        """
        embedded = self.first.cond_embed(z)  # [G, r, W]
        yield from _by_step(self.first.modulations(times[:1], embedded))
        for chunk in times[1:].split(max(1, MODULATED_ROWS // z[..., 0].numel())):
            yield from _by_step(self.net.modulations(chunk, embedded))


def _by_step(layers: Sequence[Modulation]) -> Iterator[list[Modulation]]:
    """Parts [S, G, r, W] of each layer -> for each of S steps, parts [G, r, W] of each layer."""
    unbound = [[part.unbind(0) for part in layer] for layer in layers]
    for step in range(len(unbound[0][0])):
        yield [tuple(part[step] for part in layer) for layer in unbound]


@dataclass(frozen=True)
class DiffusionStep:
    """A `HeadStep`. times: [S, W] float32, the embedded timestep of each reverse step."""

    sampler: DiffusionSampler
    options: ReverseOptions
    times: Tensor

    def draw_noise(self, generators: Sequence[torch.Generator], num_tokens: int) -> Tensor:
        """The start and one noise per reverse step: [S + 1, B, p, C] on the head's device."""
        shape = (len(self.times) + 1, num_tokens, self.sampler.channels)
        drawn = [torch.randn(shape, generator=each, device=each.device) for each in generators]
        return torch.stack(drawn, dim=1).to(self.times.device)  # [S + 1, B, p, C]

    def sample(self, z: Tensor, guide: Guide, noise: Tensor, record: bool = False) -> HeadOutput:
        """The reverse process of r tokens. z: [G, r, D]; noise: [S + 1, r, C]; gives tokens [r, C] float32."""
        options, x = self.options, noise[0]  # [r, C]
        states = [(x, x.new_zeros(len(x)))] if record else None
        modulations = self.sampler.modulations(z, self.times)
        for index, (step, modulation) in enumerate(zip(options.steps, modulations, strict=True)):
            eps, fraction = self.sampler.output(index, x, modulation).chunk(2, dim=-1)  # each [G, r, C]
            guided = guide(eps)  # [r, C]
            before = x  # [r, C]
            x = step(x, guided, fraction[0], noise[index + 1], options.temperature, options.clip_x0)  # [r, C]
            if states is not None:
                states.append((x, drawn_log_prob(step, before, guided, fraction[0], x, options)))
        return HeadOutput(x, record=states)


def drawn_log_prob(
    step: ReverseStep, before: Tensor, eps: Tensor, fraction: Tensor, after: Tensor, options: ReverseOptions
) -> Tensor:
    """Of one reverse step from `before` to `after`; all [r, C]; gives [r], 0 for the last step."""
    if step.is_last:
        return after.new_zeros(len(after))  # [r]
    mean, log_variance = step.distribution(before, eps, fraction, options.clip_x0)  # each [r, C]
    return normal_log_prob(after, mean, 0.5 * log_variance + math.log(options.temperature))  # [r]
