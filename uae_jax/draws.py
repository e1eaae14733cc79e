"""Random numbers that depend only on keys: the same on every process, in any order, for one row or many.

Source of the mixing function: SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators",
figure 16).
"""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)


def mix(x: np.ndarray | np.uint64) -> np.ndarray:
  """A bijective hash, uint64[...] -> uint64[...]."""
  with np.errstate(over="ignore"):
    x = np.asarray(x, np.uint64) + _GOLDEN  # a scalar if x has no axes
    x = (x ^ (x >> np.uint64(30))) * _MULTIPLY_1
    x = (x ^ (x >> np.uint64(27))) * _MULTIPLY_2
    return np.asarray(x ^ (x >> np.uint64(31)))


class Draws:
  """One stream of random draws per row of `keys`; each call advances all streams by one.

  Args:
    *keys: integers or int[...] arrays that broadcast; together they identify a row.
  """

  def __init__(self, *keys):
    row: np.ndarray | np.uint64 = np.uint64(0)
    for key in keys:
      row = mix(row ^ mix(np.asarray(key).astype(np.uint64)))
    self._keys = np.asarray(row, np.uint64)
    self._calls = 0

  def _bits(self, shape: tuple[int, ...]) -> np.ndarray:
    self._calls += 1
    lanes = np.arange(np.prod(shape, dtype=np.int64), dtype=np.uint64).reshape(shape)
    keys = mix(self._keys ^ mix(np.uint64(self._calls)))
    with np.errstate(over="ignore"):
      return mix(keys.reshape(keys.shape + (1,) * len(shape)) + lanes * _GOLDEN)

  def uniform(self, *shape: int) -> np.ndarray:
    """Uniform draws float64[rows..., *shape] in [0, 1)."""
    return (self._bits(shape) >> np.uint64(11)) * 2.0**-53

  def integers(self, high: int, *shape: int) -> np.ndarray:
    """Uniform integers int64[rows..., *shape] in [0, high)."""
    return (self._bits(shape) % np.uint64(high)).astype(np.int64)

  def fork(self) -> "Draws":
    """An independent stream per row, for a function that draws an unknown number of times."""
    self._calls += 1
    return Draws(self._keys, self._calls)
