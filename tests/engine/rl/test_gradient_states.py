"""Where the gradient is taken: levels, masks, the sampler's own contexts, keys."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from engine.rl.gradient_states import NoiseLevels, RealStates, RolloutStates
from engine.sample.generate import ImageConditions
from engine.sample.pipeline import StructMARPipeline
from models.policy.clean import NoisyState
from models.sampling.sampler import SampleOutput, sample
from tests.helpers.gradient_world import LEVELS, SEED
from tests.helpers.rl_world import SAMPLING, variant
from tests.helpers.training import tiny_inputs

MODEL = variant()


def real(number: int = 0, **changes: Any) -> NoisyState:
    return replace(RealStates(LEVELS, SEED), **changes).draw(MODEL, tiny_inputs(2), (number, 0, 0))


def tensors(state: NoisyState) -> dict[str, Tensor]:
    return {name: value for name, value in vars(state).items() if isinstance(value, Tensor)}


def test_every_token_is_known_or_hidden_and_levels_lie_where_they_should() -> None:
    counts, levels, second = set(), [], []
    for number in range(80):
        state = real(number, levels=NoiseLevels(300, 310))
        both = torch.cat([state.kept_ids, state.token_ids], dim=1).sort(dim=1).values
        assert torch.equal(both, torch.arange(16).expand(2, -1))
        counts.add(state.token_ids.shape[1])
        levels += state.timesteps.tolist()
        second += state.second_timesteps.flatten().tolist()
    assert set(levels) == set(range(300, 311))
    assert min(second) < 30 and max(second) > 970
    assert counts == set(range(1, 17))  # any share alike


def test_tokens_are_the_latents_and_draws_are_keyed() -> None:
    state, inputs = real(), tiny_inputs(2)
    assert torch.equal(state.tokens, MODEL.patchify(inputs.latents))
    assert state.text is not None and inputs.text is not None
    assert torch.equal(state.text.tokens, inputs.text.tokens)
    again, other = tensors(real()), tensors(real(1))
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors(state).items())
    assert not torch.equal(other["timesteps"], state.timesteps)


@dataclass
class TinyPipeline:
    """Samples as `StructMARPipeline.sample` does. drawn: what it gave last."""

    model: Any
    drawn: SampleOutput | None = None

    def sample(self, conditions: ImageConditions, config: Any, generators: Any, precision: str) -> SampleOutput:
        assert precision == "fp32"
        self.drawn = sample(self.model, config, generators, conditions.text, conditions.layout)
        return self.drawn


def test_rollouts_are_hidden_as_before_one_of_their_iterations() -> None:
    model = variant()
    pipeline = TinyPipeline(model)
    source = RolloutStates(LEVELS, SEED, cast(StructMARPipeline, pipeline), SAMPLING, "fp32")
    counts = SAMPLING.masked_counts(16)
    seen = set()
    for number in range(8):
        state = source.draw(model, tiny_inputs(2), (number, 0, 0))
        drawn = pipeline.drawn
        assert drawn is not None
        assert torch.equal(state.tokens, drawn.tokens) and not state.tokens.requires_grad
        count = state.token_ids.shape[1]
        assert torch.equal(state.token_ids, drawn.orders[:, :count].sort(dim=1).values)
        seen.add(count)
    assert len(seen) > 1 and seen <= set(counts[:-1])
    again, state = source.draw(model, tiny_inputs(2), (3, 0, 0)), source.draw(model, tiny_inputs(2), (3, 0, 0))
    assert all(torch.equal(tensors(again)[name], tensor) for name, tensor in tensors(state).items())


@pytest.mark.parametrize(("low", "high"), [(500, 400), (-1, 10), (0, 1000)])
def test_impossible_levels_are_refused(low: int, high: int) -> None:
    with pytest.raises(ValueError, match=f"got t_min {low} and t_max {high}"):
        NoiseLevels(low, high)
