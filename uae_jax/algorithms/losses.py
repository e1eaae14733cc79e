"""Helpers of the objectives: means as (sum, count), broadcasting of per-sample values, the clipped surrogate."""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")


class Loss(NamedTuple):
  """A mean as numerator and denominator, which are added over microbatches and devices and divided once at the end.

  Attributes:
    sum: float32[], the numerator.
    count: float32[], the denominator; carries no gradient.
  """

  sum: jax.Array
  count: jax.Array  # type: ignore[assignment]  # hides the method `tuple.count`, which nothing calls

  @property
  def mean(self) -> jax.Array:
    return self.sum / self.count


def at_least_float32(x: jax.Array) -> jax.Array:
  """Casts bfloat16 and float16 to float32; keeps float64, so formulas can be tested in it."""
  x = jnp.asarray(x)
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def expand(values: jax.Array, x: jax.Array) -> jax.Array:
  """Appends axes of length 1 to `values`, so that it broadcasts against `x` along the leading axes."""
  values = jnp.asarray(values)
  return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))


def mean_square(x: jax.Array, num_batch_axes: int = 1) -> jax.Array:
  """Mean of squares over all axes after the first `num_batch_axes`."""
  return jnp.mean(jnp.square(at_least_float32(x)), axis=tuple(range(num_batch_axes, x.ndim)))


def sum_and_count(values: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
  """(sum of m x, sum of m), the form of every metric; without a mask all entries count."""
  values = at_least_float32(values)
  mask = jnp.ones_like(values) if mask is None else jnp.broadcast_to(mask, values.shape).astype(values.dtype)
  return jnp.sum(values * mask), jnp.sum(mask)


def join_metrics(stacked: dict) -> dict:
  """Adds metrics over the leading axis: name -> (sums [N], counts [N]) becomes name -> (sum, count).

  In metrics named `..._max` the "sum" is a maximum.
  """

  def join(name, x):
    return jnp.max(x, axis=0) if name.endswith("_max") else jnp.sum(x, axis=0)

  return {name: tuple(join(name, x) for x in pair) for name, pair in stacked.items()}


def clipped_surrogate(
  ratio: jax.Array, advantages: jax.Array, clip_low: float, clip_high: float, delta: float | None = None
) -> jax.Array:
  """-min(min(r, delta) A, clip(r, 1 - low, 1 + high) A), elementwise.

  Source: PPO (arXiv 1707.06347); separate bounds: DAPO (arXiv 2503.14476); delta, which bounds r where A < 0:
  INTELLECT-2 (arXiv 2505.07291).
  """
  capped = ratio if delta is None else jnp.minimum(ratio, delta)
  return -jnp.minimum(capped * advantages, jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantages)


def need(value: T | None, option: str, name: str) -> T:
  """Returns the argument `name`, which `option` cannot do without.

  Raises:
    ValueError: `value` is None.
  """
  if value is None:
    raise ValueError(f"{option} needs {name}")
  return value


def require(field: str, value: str, allowed: tuple[str, ...]) -> None:
  """Checks an option against its allowed values.

  Raises:
    ValueError: `value` is not in `allowed`; the message names `field`.
  """
  if value not in allowed:
    raise ValueError(f"{field} = {value!r}: expected one of {', '.join(allowed)}")
