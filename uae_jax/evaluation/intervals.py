"""95 % confidence intervals of means: Wilson's for shares, the bootstrap for any values."""

from collections.abc import Sequence
import math

import numpy as np

NORMAL_QUANTILE = 1.959964
RESAMPLES = 10_000


def wilson(outcomes: Sequence[float], z: float = NORMAL_QUANTILE) -> tuple[float, float]:
  """Wilson's score interval of the mean of outcomes in 0..1.

  Unlike the normal approximation, it stays inside 0..1 and is valid for few outcomes and extreme rates.

  Args:
    outcomes: N values in 0..1, N at least 1.
    z: normal quantile of the interval; the default gives 95 %.
  """
  n = len(outcomes)
  rate = sum(outcomes) / n
  middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
  half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
  return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(values: Sequence[float] | np.ndarray, resamples: int = RESAMPLES) -> tuple[float, float]:
  """Percentile bootstrap interval of the mean; drawn with a fixed seed, so equal values have equal intervals.

  Args:
    values: N numbers, N at least 1.
    resamples: number of resamples.
  """
  rng, drawn = np.random.default_rng(0), np.asarray(values, np.float64)
  # In pieces: all resamples at once would be large, one at a time slow.
  sizes = [min(100, resamples - start) for start in range(0, resamples, 100)]
  means = np.concatenate([rng.choice(drawn, (size, len(drawn))).mean(axis=1) for size in sizes])
  low, high = np.quantile(means, (0.025, 0.975))
  return float(low), float(high)
