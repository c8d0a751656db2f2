"""Frechet distances by hand and against scipy, and their accumulation over batches and ranks."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from engine.eval.frechet import FrechetStatistics, collect_statistics, frechet_distance
from models.frozen.features import FeatureExtractor
from util.images import Picture


def pictures(*sizes: tuple[int, int]) -> list[Picture]:
    """One random picture per (height, width)."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def gaussian(mean: object, covariance: object, count: int = 1000) -> FrechetStatistics:
    """Statistics with exactly this mean and this covariance."""
    return FrechetStatistics(count, np.asarray(mean, float), np.asarray(covariance, float) * (count - 1))


# ---- the distance


def test_one_dimension_by_hand() -> None:
    """N(1, 4) and N(4, 9): (1 - 4)^2 + (2 - 3)^2."""
    assert frechet_distance(gaussian([1], [[4]]), gaussian([4], [[9]])).value == pytest.approx(10, abs=1e-12)


def test_commuting_covariances_by_hand() -> None:
    """diag(1, 9) and diag(16, 4), means (0, 0) and (1, 2): 1 + 4 + (1 - 4)^2 + (3 - 2)^2."""
    a, b = gaussian([0, 0], np.diag([1, 9])), gaussian([1, 2], np.diag([16, 4]))
    assert frechet_distance(a, b).value == pytest.approx(15, abs=1e-12)


def test_other_covariances_by_hand() -> None:
    """S_a = diag(4, 1), S_b = [[2, 1], [1, 2]]: their product [[8, 4], [1, 2]] has determinant 12 and trace 10,
    so tr sqrt = sqrt(10 + 2 sqrt(12)); the distance is 5 + 4 - 2 of that."""
    a, b = gaussian([0, 0], np.diag([4, 1])), gaussian([0, 0], [[2, 1], [1, 2]])
    expected = 9 - 2 * np.sqrt(10 + 2 * np.sqrt(12))
    assert frechet_distance(a, b).value == pytest.approx(expected, abs=1e-12)
    assert frechet_distance(b, a).value == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("is_commuting", [True, False])
def test_agrees_with_the_general_matrix_root(is_commuting: bool) -> None:
    rng = np.random.default_rng(1)
    axes_a, axes_b = (np.linalg.qr(rng.normal(size=(12, 12)))[0] for _ in range(2))
    axes_b = axes_a if is_commuting else axes_b
    cov_a, cov_b = ((axes * rng.uniform(0.1, 5, 12)) @ axes.T for axes in (axes_a, axes_b))
    assert np.allclose(cov_a @ cov_b, cov_b @ cov_a) == is_commuting
    mean_a, mean_b = rng.normal(size=(2, 12))
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(gaussian(mean_a, cov_a), gaussian(mean_b, cov_b)).value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count", [5, 200])  # fewer pictures than features, and more
def test_equal_statistics_are_at_distance_zero(count: int) -> None:
    statistics = FrechetStatistics.of(np.random.default_rng(2).normal(size=(count, 16)))
    assert 0 <= frechet_distance(statistics, statistics).value < 1e-6


def test_the_record_says_how_many_and_warns_of_too_few(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        enough = frechet_distance(gaussian([0, 0], np.eye(2), 3), gaussian([0, 0], np.eye(2), 50))
    assert enough.num_pictures == (3, 50) and enough.dim == 2
    assert enough.note == "3 and 50 pictures, 2 features" and not caplog.records
    few = frechet_distance(gaussian([0, 0], np.eye(2), 50), gaussian([0, 0], np.eye(2), 2))
    assert "50 and 2 pictures" in few.note and "rank-deficient" in few.note and "biased" in few.note
    assert few.note in caplog.text


# ---- the statistics


def test_statistics_are_mean_and_unbiased_covariance() -> None:
    statistics = FrechetStatistics.of(torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 6.0]]))
    assert (statistics.count, statistics.dim) == (3, 2)
    np.testing.assert_allclose(statistics.mean, [3, 2])
    np.testing.assert_allclose(statistics.covariance, [[4, 6], [6, 12]])


def test_batches_and_ranks_add_up() -> None:
    """Far from the origin, where sums of squares in float32 would lose everything."""
    values = np.random.default_rng(3).normal(size=(50, 4)) @ np.diag([1, 2, 3, 4]) + 1e4
    whole = FrechetStatistics.of(values)
    batched = FrechetStatistics.empty(4)
    for start in range(0, 50, 7):
        batched = batched.add(torch.from_numpy(values[start : start + 7]))
    ranks = [FrechetStatistics.of(values[rank::3]) for rank in range(3)]
    merged = ranks[2].merged(FrechetStatistics.empty(4)).merged(ranks[0]).merged(ranks[1])
    for each in (batched, merged):
        assert each.count == 50 and each.mean.dtype == each.scatter.dtype == np.float64
        np.testing.assert_allclose(each.mean, values.mean(0), rtol=1e-13)
        np.testing.assert_allclose(each.covariance, np.cov(values, rowvar=False), rtol=1e-9)
        assert frechet_distance(each, whole).value < 1e-6
    assert FrechetStatistics.empty(4).merged(FrechetStatistics.empty(4)).count == 0


def test_statistics_refuse_what_they_cannot_use() -> None:
    with pytest.raises(ValueError, match=r"must be \[N, D\], got \(3,\)"):
        FrechetStatistics.of(np.zeros(3))
    with pytest.raises(ValueError, match="features of 2 pictures are not all finite"):
        FrechetStatistics.of(np.array([[0.0], [np.nan]]))
    with pytest.raises(ValueError, match="at least 2 pictures, got 1"):
        frechet_distance(gaussian([0], [[1]]), FrechetStatistics.of(np.zeros((1, 1))))
    with pytest.raises(ValueError, match="of 2 and of 3 features"):
        frechet_distance(gaussian([0, 0], np.eye(2)), gaussian([0, 0, 0], np.eye(3)))
    with pytest.raises(ValueError, match="of 2 and of 3 features"):
        FrechetStatistics.empty(2).merged(FrechetStatistics.empty(3))


def test_collecting_reads_every_picture_once() -> None:
    sizes: list[int] = []

    def extract(batch: Sequence[Picture]) -> Tensor:
        sizes.append(len(batch))
        return torch.tensor([[picture.mean(), picture.std()] for picture in batch])

    images = pictures(*[(4, 5)] * 7)
    statistics = collect_statistics(FeatureExtractor("n", "i", 2, extract), iter(images), batch_size=3)
    assert sizes == [3, 3, 1]
    np.testing.assert_allclose(statistics.mean[0], np.mean([image.mean() for image in images]), rtol=1e-6)
    assert statistics.count == 7
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        collect_statistics(FeatureExtractor("n", "i", 2, extract), images, batch_size=0)
