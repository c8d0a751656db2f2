"""Confidence intervals over images: a number is computed again on image sets drawn with replacement.

The percentile bootstrap of Efron (1979). The images are the unit that is drawn, so boxes of one image stay together.
What the interval leaves out: the spread over sampling seeds, and over trainings.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from util.rng import derive_seed

COVERAGE_PERCENT = 95.0
BOOTSTRAP_SEED = 0  # of every evaluation, so that all draw the same images


@dataclass(frozen=True)
class Interval:
    """A number and the 95 % interval around it, all in the number's own unit. NaN where undefined."""

    value: float
    low: float
    high: float


def bootstrap_weights(num_images: int, num_resamples: int, seed: int) -> np.ndarray:
    """How often each image is drawn: int64 [R, num_images], every row sums to num_images.

    The same seed gives the same rows; more resamples only append rows. Raises ValueError for sizes below 1.
    """
    if num_images < 1 or num_resamples < 1:
        raise ValueError(f"num_images and num_resamples must be at least 1, got {num_images} and {num_resamples}")
    generator = np.random.default_rng(derive_seed("bootstrap over images", seed))
    chances = np.full(num_images, 1.0 / num_images)
    return generator.multinomial(num_images, chances, size=num_resamples)


def interval(value: float, samples: np.ndarray) -> Interval:
    """`value` with the central 95 % of samples [R]; samples that are NaN are left out, none left gives NaN."""
    samples = np.asarray(samples, dtype=np.float64)
    if samples.ndim != 1:
        raise ValueError(f"samples must be one row of numbers [R], got shape {samples.shape}")
    defined = samples[~np.isnan(samples)]
    if len(defined) == 0:
        return Interval(float(value), float("nan"), float("nan"))
    tail = (100.0 - COVERAGE_PERCENT) / 2
    low, high = np.percentile(defined, [tail, 100.0 - tail])
    return Interval(float(value), float(low), float(high))
