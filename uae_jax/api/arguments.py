"""Checks of the arguments of the Python API."""

from collections.abc import Sequence
import functools
import math
import operator
from typing import TypeVar

import jax
import numpy as np

from uae_jax.options.sampling import LARGEST_SEED

Value = TypeVar("Value")


def or_default(value: Value | None, default: Value) -> Value:
  """The value, as Python's own number if it is one of NumPy; the default for None."""
  if isinstance(value, np.generic):
    return value.item()
  return default if value is None else value


def checked_whole(name: str, value: int, lowest: float = 0, highest: float = LARGEST_SEED) -> int:
  """Checks an argument that is a whole number.

  Raises:
    ValueError: it is not, or out of range.
  """
  try:
    number = operator.index(value)
  except TypeError as error:
    raise ValueError(f"{name} = {value!r}: expected a whole number") from error
  if not lowest <= number <= highest:
    # JAX would use the lowest 32 bits of a seed only.
    expected = f"{lowest} to {highest}" if math.isfinite(highest) else f"at least {lowest}"
    raise ValueError(f"{name} = {number}: expected {expected}")
  return number


def keys_of(seed: int, indices: Sequence[int] | None, count: int) -> jax.Array:
  """Random keys [count], each of which depends on the seed and the index of its image only.

  Raises:
    ValueError: the seed or an index is out of range, or there are not as many indices as images.
  """
  key = jax.random.key(checked_whole("seed", seed))
  indices = range(count) if indices is None else indices
  if len(indices) != count:
    raise ValueError(f"{count} images, but {len(indices)} indices")
  checked = [checked_whole("an index", index) for index in indices]
  # Together, because a call per image takes as long as a small model; padded, so that few programs serve all counts.
  padded = np.zeros(1 << max(count - 1, 0).bit_length(), np.uint32)
  padded[:count] = checked
  return _fold_in(key, padded)[:count]


def noise_of(keys: jax.Array, shape: tuple[int, ...]) -> np.ndarray:
  """Standard normal noise float32[N, *shape] of keys [N]."""
  return np.asarray(_normal(keys, shape))


@jax.jit
def _fold_in(key: jax.Array, indices: jax.Array) -> jax.Array:
  return jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)


@functools.partial(jax.jit, static_argnames="shape")
def _normal(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
