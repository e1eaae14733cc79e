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


def linear_decay(step: jax.Array, slope: float, ceiling: float) -> jax.Array:
  """min(slope n, ceiling) at step n: at first a copy of the parameters, later a slow average.

  Source: DiffusionNFT (arXiv 2509.16117), slope 0.001, ceiling 0.5.
  """
  return jnp.minimum(slope * step, ceiling)


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
