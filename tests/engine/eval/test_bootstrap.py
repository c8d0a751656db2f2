"""Bootstrap weights and intervals, against distributions whose quantiles are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engine.eval.bootstrap import bootstrap_weights, interval


def test_every_resample_draws_as_many_images_as_there_are() -> None:
    weights = bootstrap_weights(num_images=37, num_resamples=50, seed=0)
    assert weights.shape == (50, 37) and weights.dtype.kind == "i"
    assert (weights.sum(axis=1) == 37).all() and weights.min() == 0 and weights.max() > 1


def test_weights_depend_on_the_seed_alone() -> None:
    weights = bootstrap_weights(20, 8, seed=3)
    np.testing.assert_array_equal(weights, bootstrap_weights(20, 8, seed=3))
    np.testing.assert_array_equal(weights[:5], bootstrap_weights(20, 5, seed=3))
    assert (weights != bootstrap_weights(20, 8, seed=4)).any()


def test_images_are_drawn_with_replacement_and_equal_chances() -> None:
    weights = bootstrap_weights(50, 4000, seed=1)
    np.testing.assert_allclose(weights.mean(axis=0), 1.0, atol=0.1)  # 6 standard errors
    assert abs((weights == 0).mean() - (1 - 1 / 50) ** 50) < 0.01  # the share left out


def test_bootstrap_interval_of_a_mean_is_the_normal_one() -> None:
    values = np.linspace(-1.0, 1.0, 100)
    samples = bootstrap_weights(100, 2000, seed=2) @ values / 100
    found = interval(values.mean(), samples)
    expected = 1.96 * values.std() / math.sqrt(100)
    assert found.value == pytest.approx(0, abs=1e-12)
    assert found.low == pytest.approx(-expected, rel=0.15) and found.high == pytest.approx(expected, rel=0.15)


def test_interval_is_the_central_95_percent() -> None:
    found = interval(7.0, np.arange(1001.0)[::-1])
    assert (found.value, found.low, found.high) == pytest.approx((7.0, 25.0, 975.0))


def test_undefined_resamples_are_left_out() -> None:
    found = interval(0.5, np.array([math.nan, 0.5, math.nan, 0.5]))
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)
    for samples in (np.array([]), np.full(3, math.nan)):
        nothing = interval(math.nan, samples)
        assert math.isnan(nothing.value) and math.isnan(nothing.low) and math.isnan(nothing.high)


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="got 0 and 5"):
        bootstrap_weights(0, 5, seed=0)
    with pytest.raises(ValueError, match=r"shape \(2, 2\)"):
        interval(0.0, np.zeros((2, 2)))
