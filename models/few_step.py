"""Few-step distillation: a second network of the head learns to draw what the whole sampler of a token draws.

Per token, with x_i the network's draws and y_j the sampler's under the same condition z (and, where it is guided, those
of the other branches), the loss is an unbiased estimate of the energy score

    S = E|x - y| - E|x - x'| / 2.

It is strictly proper (Gneiting and Raftery 2007): where it is least, x and y are equally distributed, whatever
guidance, temperature and reverse steps y was drawn with. There is neither a second score network nor an adversary. The
states are those of training, given images of which some tokens are hidden; what the sampler comes to is like them but
not the same.

A number of evaluations is drawn for every step, of `TRAINED_EVALS`, and every evaluation is scored. Each takes the
token of the one before without its gradient, so an evaluation answers for what it makes of its input, as it is met when
sampling.

Left out: the backbone's own part; it stays as it is. Other evaluations than those of `levels`.

Shape letters: B images, L tokens, D backbone width, C token channels, G guidance branches, S reverse steps,
N evaluations, r tokens that are drawn, m draws of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.distillation import scales_at
from models.heads.few_step import levels, noisy, predicted
from models.masking import TokenMask, sample_token_mask
from models.sampling.config import SamplingConfig
from models.sampling.guidance import choose_branches, combine_branches
from models.structmar import StructMAR
from util.types import LayoutBatch, SizeBatch, TextContext

TRAINED_EVALS = (1, 2, 4)  # others can be sampled; their levels lie between
TINY = 1e-12  # under the root of a distance: its gradient is finite at 0


@dataclass(frozen=True)
class FewStepSettings:
    """tokens: that are drawn of each image; draws: of each token, by the sampler and by the network."""

    tokens: int = 16
    draws: int = 2

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.draws < 2:
            raise ValueError(f"at least 1 token and 2 draws are needed, got {self.tokens} and {self.draws}")


@dataclass(frozen=True)
class FewStepNoise:
    """Everything random about a step. mask: the hidden tokens. rows: [r] int64, those that are drawn, of all B * L.
    teacher: [S + 1, m * r, C], of the reverse processes; student: [N, m * r, C]; m copies of all tokens in turn."""

    mask: TokenMask
    rows: Tensor
    teacher: Tensor
    student: Tensor

    def to(self, device: torch.device | str) -> FewStepNoise:
        moved = (each.to(device) for each in (self.rows, self.teacher, self.student))
        return FewStepNoise(self.mask.to(device), *moved)


def draw_noise(
    model: StructMAR,
    sampling: SamplingConfig,
    settings: FewStepSettings,
    batch_size: int,
    generator: torch.Generator,
    mask_ratio_min: float,
    grid: tuple[int, int],
    mask_schedule: str | None = None,
) -> FewStepNoise:
    """The randomness of one step, on the generator's device. sampling: of the teacher."""
    config, device = model.config, generator.device
    num_tokens, per_image = grid[0] * grid[1], config.trunk == "single"
    schedule = mask_schedule or config.mask_schedule
    mask = sample_token_mask(batch_size, num_tokens, mask_ratio_min, generator, schedule, per_image)
    keys = torch.rand(batch_size, num_tokens, generator=generator, device=device)  # [B, L]
    places = keys.masked_fill(~mask.masked, 2.0).argsort(dim=1)  # [B, L], hidden ones first
    count = min(settings.tokens, *hidden_counts(mask))
    rows = torch.arange(batch_size, device=device)[:, None] * num_tokens + places[:, :count]  # [B, r / B]
    chosen = int(torch.randint(len(TRAINED_EVALS), (), generator=generator, device=device))
    num_noises = sampling.head_options(0).num_calls + 1
    counts, shape = (num_noises, TRAINED_EVALS[chosen]), (settings.draws * rows.numel(), config.token_dim)
    teacher, student = (torch.randn(each, *shape, generator=generator, device=device) for each in counts)
    return FewStepNoise(mask, rows.flatten(), teacher, student)


def hidden_counts(mask: TokenMask) -> tuple[int, ...]:
    """How many tokens of each image are hidden."""
    return mask.counts or (mask.num_masked,) * len(mask.masked)


class FewStepDistilled(nn.Module):
    """Teacher, student and loss behind one `forward`, which takes what `StructMAR.forward` takes, but for the noise:
    wrappers such as DDP act on `forward` alone. All of the model is frozen but `diffloss.few`."""

    def __init__(self, model: StructMAR, sampling: SamplingConfig, settings: FewStepSettings) -> None:
        """sampling: of the teacher."""
        super().__init__()
        self.model, self.sampling, self.settings = model, sampling, settings

    def forward(
        self,
        latents: Tensor,
        noise: FewStepNoise,
        labels: Tensor | None = None,
        text: TextContext | None = None,
        layout: LayoutBatch | None = None,
        sizes: SizeBatch | None = None,
    ) -> Tensor:
        """The mean energy distance of the evaluations, a scalar, 0 in expectation where both are equally distributed.

        latents: [B, C, h, w] scaled; labels: [B] int64; sizes: of the pictures.
        """
        names, config = choose_branches(self.sampling, text is not None or labels is not None, layout is not None)
        given = {"full": (labels, text, layout), "text": (labels, text, None), "null": (None, None, None)}
        with torch.no_grad():
            z = torch.stack([self.conditions(latents, noise, *given[name], sizes) for name in names])  # [G, r, D]
            with torch.autocast(z.device.type, enabled=False):
                wanted = self.teacher_draws(names, config, z.float(), noise)  # [m, r, C]
        draws = self.student_draws(z[0], noise.student)  # N of [m, r, C]
        return torch.stack([energy_distance(each, wanted) for each in draws]).mean()

    def conditions(
        self,
        latents: Tensor,
        noise: FewStepNoise,
        labels: Tensor | None,
        text: TextContext | None,
        layout: LayoutBatch | None,
        sizes: SizeBatch | None,
    ) -> Tensor:
        """The backbone's outputs of the tokens that are drawn: [r, D]."""
        model, tokens = self.model, self.model.patchify(latents)  # [B, L, C]
        embedded = model.embed_conditions(len(tokens), labels, text, layout, model.grid_of(latents), sizes)
        z = model.predict(tokens, noise.mask.kept_ids(), model.prepare(embedded))  # [B, L, D]
        return z.flatten(0, 1).index_select(0, noise.rows)  # [r, D]

    def teacher_draws(self, names: Sequence[str], config: SamplingConfig, z: Tensor, noise: FewStepNoise) -> Tensor:
        """What the sampler draws under z [G, r, D], each token m times: [m, r, C]."""
        num_draws, num_tokens = self.settings.draws, noise.mask.masked.shape[1]
        by_image = [scales_at(config, num_tokens, count) for count in hidden_counts(noise.mask)]
        scales = z.new_tensor(by_image)[noise.rows // num_tokens]  # [r, 2]
        w_text, w_layout = scales.repeat(num_draws, 1).split(1, dim=1)  # each [m * r, 1]

        def guide(eps: Tensor) -> Tensor:
            return combine_branches(dict(zip(names, eps.unbind(0), strict=True)), w_text, w_layout)  # [m * r, C]

        step = self.model.head.sampler(self.model.head, None).at(config.head_options(0))
        drawn = step.sample(z.repeat(1, num_draws, 1), guide, noise.teacher).tokens  # [m * r, C]
        return drawn.unflatten(0, (num_draws, -1))  # [m, r, C]

    def student_draws(self, z: Tensor, noise: Tensor) -> list[Tensor]:
        """What the network draws under z [r, D] in each of its N evaluations: N of [m, r, C]. noise: [N, m * r, C]."""
        network = self.model.diffloss.few
        assert network is not None, "the model has a few-step head"
        token, drawn = torch.zeros_like(noise[0]), []  # [m * r, C]
        for index, level in enumerate(levels(len(noise))):
            x = noisy(token.detach(), noise[index], level, is_first=index == 0)  # [m * r, C]
            timesteps = torch.full((len(x),), level.timestep, device=x.device)  # [m * r]
            token = predicted(x, network(x, timesteps, z).float(), level)  # [m * r, C]
            drawn.append(token.unflatten(0, (self.settings.draws, -1)))
        return drawn


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """2 E|x - y| - E|x - x'| - E|y - y'|, without bias, the mean over tokens: a scalar.

    x, y: [m, r, C], m draws of each of two distributions per token. Its gradient in x is that of 2 S.
    """
    return 2 * distances(x, y).mean() - mean_of_pairs(x) - mean_of_pairs(y)


def distances(x: Tensor, y: Tensor) -> Tensor:
    """[m, r, C], [n, r, C] -> [m, n, r]."""
    return ((x[:, None] - y).square().sum(-1) + TINY).sqrt()  # [m, n, r]


def mean_of_pairs(x: Tensor) -> Tensor:
    """The mean distance of two different ones of m draws. [m, r, C] -> a scalar."""
    return distances(x, x).mean() * len(x) / (len(x) - 1)


def require_fitting_teacher(config: SamplingConfig) -> None:
    """Raises ValueError for sampling options that a teacher of single tokens cannot have."""
    config.require_uncontrolled("few-step distillation, whose teacher hears captions and boxes as they are given")
    for name, value, reason in (
        ("prefix_k", config.prefix_k or None, "which knows no prefix"),
        ("num_sampling_steps_last", config.num_sampling_steps_last, "whose teacher draws all tokens alike"),
        ("head_evals", config.head_evals, "whose teacher is the reverse process"),
    ):
        if value is not None:
            raise ValueError(f"{name} {value} does not go with few-step distillation, {reason}")
