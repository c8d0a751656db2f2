"""Clean tokens in a few steps: the formula, a perfect head, the second level, what has no gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from models.heads.diffloss import DiffLoss
from models.policy.clean import CleanPolicy, NoisyState, output_at_second
from models.structmar import StructMAR
from tests.helpers.gradient_world import LEVELS
from tests.helpers.rl_world import code_variant, variant
from tests.helpers.training import tiny_inputs

MASKED = 11


def state_of(model: StructMAR, batch_size: int = 2, t: int | None = None) -> NoisyState:
    """t: the level of all images, by default drawn."""
    inputs, draws = tiny_inputs(batch_size), torch.Generator().manual_seed(3)
    orders = torch.stack([torch.randperm(16, generator=draws) for _ in range(batch_size)])
    state = LEVELS.noisy(model.patchify(inputs.latents), orders, MASKED, (4, 4), inputs, draws)
    return state if t is None else replace(state, timesteps=torch.full((batch_size,), t))


def policy(model: StructMAR, num_steps: int = 1, clip_x0: float | None = None, has_second: bool = True) -> CleanPolicy:
    return CleanPolicy(model, num_steps, clip_x0, has_second)


class Oracle(nn.Module):
    """Says the noise of tokens that all are `value`."""

    def __init__(self, head: DiffLoss, value: float) -> None:
        super().__init__()
        self.tables_at, self.value, self.seen = head.tables_at, value, list[int]()

    def forward(self, noisy: Tensor, timesteps: Tensor, _z: Tensor) -> Tensor:
        self.seen.append(int(timesteps.max()))
        tables = self.tables_at(timesteps)  # each [r, 1]
        eps = (noisy - tables["sqrt_alphas_cumprod"] * self.value) / tables["sqrt_one_minus_alphas_cumprod"]
        return torch.cat([eps, torch.zeros_like(eps)], dim=1)


def test_one_step_is_the_formula_at_the_images_level() -> None:
    model = variant()
    state = state_of(model)
    assert len(set(state.timesteps.tolist())) == 2  # one for each image
    timesteps = state.timesteps[:, None].expand(-1, MASKED)
    noisy = model.diffloss.add_noise(state.hidden(), timesteps, state.noise)
    arguments = (state.tokens, state.kept_ids, state.token_ids, noisy[:, :, None], timesteps[..., None])
    eps = model.denoise(*arguments, text=state.text, layout=state.layout, grid=(4, 4))[:, :, 0, :4]
    tables = model.diffloss.tables_at(timesteps)
    expected = (noisy - tables["sqrt_one_minus_alphas_cumprod"] * eps) / tables["sqrt_alphas_cumprod"]
    found = policy(model)(state)
    torch.testing.assert_close(found.tokens, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(policy(model, clip_x0=0.5)(state).tokens, expected.clamp(-0.5, 0.5))
    torch.testing.assert_close(policy(model, has_second=False)(state).tokens, found.tokens)
    whole = state.with_tokens(found.tokens)
    assert torch.equal(whole.gather(1, state.token_ids[..., None].expand(-1, -1, 4)), found.tokens)
    assert torch.equal(whole.gather(1, state.kept_ids[..., None].expand(-1, -1, 4)),
                       state.tokens.gather(1, state.kept_ids[..., None].expand(-1, -1, 4)))  # fmt: skip


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_a_perfect_head_finds_the_token_in_any_number_of_steps(num_steps: int) -> None:
    model = variant()
    oracle = Oracle(model.diffloss, 0.75)
    model.diffloss.net = oracle
    found = policy(model, num_steps, has_second=False)(state_of(model, t=800))
    torch.testing.assert_close(found.tokens, torch.full_like(found.tokens, 0.75), rtol=1e-4, atol=1e-4)
    assert oracle.seen == [800 * (num_steps - step) // num_steps for step in range(num_steps)]


def test_all_steps_have_gradients() -> None:
    """Of a head that is a number alone, K steps are K factors."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(0.5))

        def forward(self, noisy: Tensor, _timesteps: Tensor, _z: Tensor) -> Tensor:
            return torch.cat([self.weight * noisy, noisy], dim=1)

    model, values = variant(), {}
    model.diffloss.net = head = Scale()
    for num_steps in (1, 3):
        state = state_of(model, t=600)
        (values[num_steps],) = torch.autograd.grad(policy(model, num_steps)(state).tokens.square().sum(), head.weight)
        with torch.no_grad():
            head.weight += 1e-3
            above = policy(model, num_steps)(state).tokens.square().sum()
            head.weight -= 2e-3
            below = policy(model, num_steps)(state).tokens.square().sum()
            head.weight += 1e-3
        torch.testing.assert_close(values[num_steps], (above - below) / 2e-3, rtol=1e-2, atol=0.1)
    assert values[1] != values[3]


def test_the_second_level_is_another_models_too() -> None:
    model = variant()
    state = state_of(model)
    found = policy(model)(state).second
    assert found is not None
    torch.testing.assert_close(found, output_at_second(model, state), rtol=1e-5, atol=1e-5)
    low, high = int(state.second_timesteps.min()), int(state.second_timesteps.max())
    assert low < LEVELS.t_min and high > LEVELS.t_max  # beyond what the reward sees


def test_codes_have_no_such_gradient() -> None:
    with pytest.raises(ValueError, match="codes have no gradient of a reward: the model has the discrete head"):
        policy(code_variant())
