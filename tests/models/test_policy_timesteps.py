"""At which noise levels the ELBO estimator scores tokens."""

from __future__ import annotations

import pytest
import torch

from models.policy.base import Samples
from models.policy.elbo import ElboEstimator

ORDERS = torch.stack([torch.arange(16), torch.arange(15, -1, -1)])
SAMPLES = Samples(torch.zeros(2, 16, 4), ORDERS, (4, 4), None, None)


def timesteps_of(estimator: ElboEstimator) -> torch.Tensor:
    (noise,) = estimator.draw_noise(SAMPLES, torch.Generator().manual_seed(0))
    return noise.timesteps  # [n, m, K]


def test_a_range_is_filled_and_not_left() -> None:
    """Stratified within it: each half of its draws lies in a stratum of its own."""
    found = timesteps_of(ElboEstimator(4, num_masks=1, num_draws=8, t_range=(600, 1000)))
    strata = (found[..., :4] - 600) // 100
    assert torch.equal(strata, torch.arange(4).expand_as(strata))


def test_the_range_moves_draws_and_nothing_else() -> None:
    whole, part = (timesteps_of(ElboEstimator(4, 1, 2, t_range=each)) for each in ((0, 1000), (500, 1000)))
    assert ((part - 500 - whole / 2).abs() <= 1).all()
    assert torch.equal(timesteps_of(ElboEstimator(4, 1, 2)), whole)


def test_a_range_of_one_has_one_timestep() -> None:
    assert timesteps_of(ElboEstimator(4, 1, 4, t_range=(999, 1000))).unique().tolist() == [999]


@pytest.mark.parametrize("t_range", [(500, 500), (-1, 10), (0, 1001), (700, 200)])
def test_ranges_that_are_none(t_range: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"the smaller first, got {t_range[0]} and {t_range[1]}"):
        ElboEstimator(4, t_range=t_range)
