"""The optimizer of every stage: AdamW with clipping by global norm, and optionally Muon for chosen matrices.

It receives trainable parameters only; `State` separates them from the frozen ones.
"""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from uae_jax.options import OptimizerOptions

# Root mean square of an orthogonalized update divided by the learning rate. It equals that of AdamW, so that both can
# use the same learning rate. Source: arXiv 2502.16982 section 2.2.
_MUON_RMS = 0.2


def learning_rate(options: OptimizerOptions, total_steps: int) -> optax.Schedule:
  """Makes the schedule: optimizer step -> learning rate."""
  warmup = max(1, round(total_steps * options.warmup_percent / 100))
  if options.schedule == "cosine":
    peak, end = options.learning_rate, options.learning_rate * options.end_factor
    # Starts above zero: a first step of rate zero would waste a rollout.
    return optax.warmup_cosine_decay_schedule(peak / warmup, peak, warmup, max(total_steps, warmup + 1), end)
  return optax.linear_schedule(options.learning_rate / warmup, options.learning_rate, warmup)


class SpikeState(NamedTuple):
  """State of `skip_spikes`.

  Attributes:
    average: float32[], moving average of the gradient norm; 0 before the first update.
    num_skipped: int32[], number of updates skipped so far.
    inner: state of the wrapped optimizer.
  """

  average: jax.Array
  num_skipped: jax.Array
  inner: optax.OptState


def skip_spikes(inner: optax.GradientTransformation, factor: float, decay: float = 0.9) -> optax.GradientTransformation:
  """Skips updates whose gradient norm exceeds `factor` times its moving average.

  A skipped update changes neither parameters nor the state of `inner`. A spike enters the average as the limit that it
  exceeded, so a lasting increase is accepted after a few steps. Non-finite gradients are not handled here:
  `apply_gradients` discards such updates together with their optimizer state.

  Args:
    inner: optimizer to wrap.
    factor: limit of the gradient norm relative to its moving average.
    decay: decay of the moving average.
  """

  def init(params):
    return SpikeState(jnp.float32(0.0), jnp.int32(0), inner.init(params))

  def update(grads, state, params=None):
    norm = optax.tree.norm(grads).astype(jnp.float32)
    limit = jnp.where(state.average > 0, factor * state.average, jnp.inf)
    is_spike = norm > limit
    average = jnp.where(state.average > 0, decay * state.average + (1 - decay) * jnp.minimum(norm, limit), norm)
    updates, after = inner.update(grads, state.inner, params)
    updates = jax.tree.map(lambda update: jnp.where(is_spike, 0, update), updates)
    after = jax.tree.map(lambda new, old: jnp.where(is_spike, old, new), after, state.inner)
    return updates, SpikeState(average, state.num_skipped + is_spike, after)

  return optax.GradientTransformation(init, update)


def spikes_skipped(opt_state: optax.OptState) -> dict[str, jax.Array]:
  """Returns {"spikes_skipped": float32[]}, the number so far in this stage; empty without `skip_spikes`."""
  return {"spikes_skipped": opt_state.num_skipped.astype(jnp.float32)} if isinstance(opt_state, SpikeState) else {}


def muon_matrices(params: dict, pattern: str) -> dict:
  """Returns a tree with Muon's dimension numbers for parameters that match `pattern`, and None for AdamW's parameters.

  Raises:
    ValueError: the pattern matches no parameter, or one that is not a matrix.
  """

  def dimensions(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if not re.search(pattern, name):
      return None
    if leaf.ndim < 2:
      raise ValueError(f"optimizer.muon = {pattern!r} matches {name}, shape {leaf.shape}, which is no matrix")
    return contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

  tree = jax.tree.map_with_path(dimensions, params)
  if not jax.tree.leaves(tree):
    raise ValueError(f"optimizer.muon = {pattern!r} matches nothing that this stage trains")
  return tree


def make_optimizer(options: OptimizerOptions, total_steps: int) -> optax.GradientTransformation:
  """Makes the optimizer of a stage; `total_steps` counts optimizer steps."""
  rate = learning_rate(options, total_steps)
  if options.muon:
    update = contrib.muon(
      rate,
      eps=options.eps,
      weight_decay=options.weight_decay,
      adam_b1=options.b1,
      adam_b2=options.b2,
      adam_weight_decay=options.weight_decay,
      muon_weight_dimension_numbers=lambda params: muon_matrices(params, options.muon),
      consistent_rms=_MUON_RMS,
    )
  else:
    update = optax.adamw(rate, b1=options.b1, b2=options.b2, eps=options.eps, weight_decay=options.weight_decay)
  optimizer = optax.chain(optax.clip_by_global_norm(options.clip_norm), update)
  return skip_spikes(optimizer, options.spike_factor) if options.spike_factor else optimizer
