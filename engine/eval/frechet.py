"""The Frechet distance between two sets of pictures, from statistics that add up over batches, shards and ranks.

    d^2 = |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))

of Gaussians fitted to features (Dowson & Landau 1982; Heusel et al. 2017, arXiv:1706.08500, equation 6). What the
number is called is the feature extractor's to say (`models.frozen.features`): it is FID over FID's own network only.

Left out: unbiased alternatives (KID; FID extrapolated to infinite N). The estimate depends on N, so N stands beside it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import numpy as np
from torch import Tensor

from models.frozen.features import FeatureExtractor
from util.images import Picture

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class FrechetStatistics:
    """Count, mean and scatter of feature vectors, in float64. D: features.

    count: N. mean: [D]. scatter: [D, D], sum of (x - mean)(x - mean)^T. Plain arrays: may be pickled and gathered.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def empty(cls, dim: int) -> FrechetStatistics:
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    @classmethod
    def of(cls, features: Tensor | np.ndarray) -> FrechetStatistics:
        """features: [N, D], N may be 0. Raises ValueError for another shape or values that are not finite."""
        values = features.detach().cpu().numpy() if isinstance(features, Tensor) else np.asarray(features)
        if values.ndim != 2 or values.shape[1] == 0:
            raise ValueError(f"features must be [N, D], got {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError(f"features of {len(values)} pictures are not all finite")
        if len(values) == 0:
            return cls.empty(values.shape[1])
        values = values.astype(np.float64)
        mean = values.mean(0)
        centered = values - mean
        return cls(len(values), mean, centered.T @ centered)

    @property
    def dim(self) -> int:
        return len(self.mean)

    @property
    def covariance(self) -> np.ndarray:
        """[D, D], unbiased (divided by N - 1). Raises ValueError for fewer than two pictures."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 pictures, got {self.count}")
        return self.scatter / (self.count - 1)

    def merged(self, other: FrechetStatistics) -> FrechetStatistics:
        """The statistics of both sets together (Chan et al. 1979). Raises ValueError if their dimensions differ."""
        _check_same_dim(self, other)
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        between = np.outer(delta, delta) * (self.count * other.count / count)
        return FrechetStatistics(count, mean, self.scatter + other.scatter + between)

    def add(self, features: Tensor | np.ndarray) -> FrechetStatistics:
        """The statistics with [N, D] more features."""
        return self.merged(FrechetStatistics.of(features))


@dataclass(frozen=True)
class FrechetDistance:
    """A squared Frechet distance and what it rests on: the pictures on either side, and the features' dimension."""

    value: float
    num_pictures: tuple[int, int]
    dim: int

    @property
    def note(self) -> str:
        """To stand beside the number."""
        counts = f"{self.num_pictures[0]} and {self.num_pictures[1]} pictures, {self.dim} features"
        if min(self.num_pictures) > self.dim:
            return counts
        return f"{counts}: no more pictures than features, so a covariance is rank-deficient and the number is biased"


def collect_statistics(
    extractor: FeatureExtractor, pictures: Iterable[Picture], batch_size: int = 32
) -> FrechetStatistics:
    """The statistics of the pictures' features; `pictures` is read `batch_size` at a time.

    Raises ValueError if batch_size < 1, or for something that is no picture.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    statistics = FrechetStatistics.empty(extractor.dim)
    remaining = iter(pictures)
    while batch := list(islice(remaining, batch_size)):
        statistics = statistics.add(extractor(batch))
    return statistics


def frechet_distance(a: FrechetStatistics, b: FrechetStatistics) -> FrechetDistance:
    """|mu_a - mu_b|^2 + tr S_a + tr S_b - 2 tr (S_a^(1/2) S_b S_a^(1/2))^(1/2), Heusel et al. 2017 (arXiv:1706.08500).

    S_a S_b and S_a^(1/2) S_b S_a^(1/2) have the same eigenvalues, but the latter is symmetric: no square root of a
    general matrix, no complex remainder. The trace of its root is the sum of its eigenvalues' roots; those that
    rounding made negative count as 0, which leaves about 1e-8 of the largest variance per feature.
    Warns if a side has no more pictures than features. Raises ValueError for unequal dimensions or a side with fewer
    than two pictures.
    """
    _check_same_dim(a, b)
    covariance_a, covariance_b = a.covariance, b.covariance
    root = _symmetric_root(covariance_a)
    product = root @ covariance_b @ root
    cross = float(np.sqrt(np.clip(np.linalg.eigvalsh((product + product.T) / 2), 0, None)).sum())
    difference = a.mean - b.mean
    value = float(difference @ difference + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross)
    result = FrechetDistance(max(value, 0.0), (a.count, b.count), a.dim)  # rounding may leave less than nothing
    if min(result.num_pictures) <= result.dim:
        logger.warning("Frechet distance over %s", result.note)
    return result


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric root of a positive semi-definite [D, D]; eigenvalues that rounding made negative count as 0."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def _check_same_dim(a: FrechetStatistics, b: FrechetStatistics) -> None:
    if a.dim != b.dim:
        raise ValueError(f"statistics of {a.dim} and of {b.dim} features: they come from different extractors")
