"""Exponential moving averages of parameters.

They serve as the evaluated policy, and as the slow "old" policy of forward-process objectives.
"""

import jax
import jax.numpy as jnp

from uae_jax.algorithms.losses import at_least_float32


def warmup_decay(step: jax.Array, ceiling: float) -> jax.Array:
  """min((1 + n) / (10 + n), ceiling) at step n.

  Source: flow_grpo's EMA, after TensorFlow's ExponentialMovingAverage with num_updates.
  """
  return jnp.minimum((1.0 + step) / (10.0 + step), ceiling)


def linear_decay(step: jax.Array, slope: float, ceiling: float, start: int = 0) -> jax.Array:
  """min(slope max(n - start, 0), ceiling) at step n: at first a copy of the parameters, later a slow average.

  Source: DiffusionNFT (arXiv 2509.16117); decay types of its code: 1 has slope 0.001 and ceiling 0.5, 2 has start 75,
  slope 0.0075 and ceiling 0.999.
  """
  return jnp.minimum(slope * jnp.maximum(step - start, 0), ceiling)


def is_due(step: jax.Array, interval: int) -> jax.Array:
  """Whether an average that is updated every `interval` steps is updated after step n = 0, 1, ...: bool[]."""
  return (step + 1) % interval == 0


def update(average: dict, params: dict, decay: jax.Array) -> dict:
  """decay average + (1 - decay) params per leaf, computed in at least float32 and stored in the average's dtype.

  Args:
    average: nested dict of float[...].
    params: nested dict of the same structure.
    decay: float32[] in [0, 1], a constant or the value of a schedule above.
  """

  def leaf(old, new):
    old_full = at_least_float32(old)
    return (old_full + (1 - decay) * (at_least_float32(new) - old_full)).astype(old.dtype)

  return jax.tree.map(leaf, average, params)
