"""Advantages from rewards, always relative to the group of rollouts of one prompt.

Statistics over the batch are global under sharding.
"""

from collections.abc import Mapping
import dataclasses

import jax
import jax.numpy as jnp

from uae_jax.algorithms.losses import at_least_float32
from uae_jax.options import AdvantageOptions


def _moments(values: jax.Array, valid: jax.Array, axis, is_unbiased: bool) -> tuple[jax.Array, jax.Array]:
  """(mean, std) of the valid entries over `axis`, which is kept with length 1."""
  count = jnp.sum(valid, axis=axis, keepdims=True)
  mean = jnp.sum(jnp.where(valid, values, 0), axis=axis, keepdims=True) / jnp.maximum(count, 1)
  square = jnp.sum(jnp.where(valid, jnp.square(values - mean), 0), axis=axis, keepdims=True)
  return mean, jnp.sqrt(square / jnp.maximum(count - is_unbiased, 1))


def _is_constant(rewards: jax.Array) -> jax.Array:
  """bool[prompts]: whether all finite rewards of a group are equal.

  Compares instead of testing the std, because the std of equal floats need not round to 0.
  """
  valid = jnp.isfinite(rewards)
  highest = jnp.max(jnp.where(valid, rewards, -jnp.inf), axis=1)
  lowest = jnp.min(jnp.where(valid, rewards, jnp.inf), axis=1)
  return highest <= lowest


def _normalize(rewards: jax.Array, options: AdvantageOptions) -> jax.Array:
  """Rewards centered within the group and scaled; 0 for constant groups and for non-finite rewards."""
  valid = jnp.isfinite(rewards)
  mean, std = _moments(rewards, valid, 1, options.is_unbiased)
  if options.scale == "batch":
    _, std = _moments(rewards, valid, None, options.is_unbiased)
  elif options.scale == "mean_group":
    std = jnp.sum(std) / jnp.maximum(jnp.sum(jnp.any(valid, axis=1)), 1)
  scaled = rewards - mean if options.scale == "none" else (rewards - mean) / (std + options.eps)
  return jnp.where(valid & ~_is_constant(rewards)[:, None], scaled, 0)


def _clip(advantages: jax.Array, options: AdvantageOptions) -> jax.Array:
  return jnp.clip(advantages, -options.clip, options.clip) if options.clip else advantages


def group_advantages(rewards: jax.Array, options: AdvantageOptions) -> jax.Array:
  """A_ij = (r_ij - mean_j r_ij) / (std + eps).

  A non-finite reward (a failed external reward) is excluded from all statistics and has advantage 0; a group of equal
  rewards has exactly 0.

  Source: GRPO (arXiv 2402.03300); Dr. GRPO (arXiv 2503.20783) without the divisor.

  Args:
    rewards: float32[prompts, rollouts].
    options: uses `scale`, `is_unbiased`, `eps` and `clip`.

  Returns:
    float32[prompts, rollouts], without gradient.
  """
  return _clip(_normalize(jax.lax.stop_gradient(at_least_float32(rewards)), options), options)


def multi_reward_advantages(
  rewards: Mapping[str, jax.Array], weights: Mapping[str, float], options: AdvantageOptions
) -> jax.Array:
  """Advantages of a weighted sum of rewards.

      sum_then_normalize   group_advantages(sum_k w_k r_k); a rollout that lacks one reward has advantage 0
      normalize_then_sum   s = sum_k w_k (r_k - mean_group r_k) / (std_group r_k + eps);  A = s / (std_batch s + eps)

  The second form gives rewards of small spread their full weight. Its s already has mean 0 in every group, so no mean
  is subtracted again. A rollout that lacks some rewards has the sum of the others; one without any has advantage 0 and
  is not part of std_batch. In the first form TRL sums the rewards that are left: here such a sum, of fewer terms than
  those of its group, is not compared with them.

  Source: GDPO (arXiv 2601.05242); TRL multi_objective_aggregation.

  Args:
    rewards: name -> float32[prompts, rollouts].
    weights: name -> w_k; rewards without a weight do not contribute.
    options: `scale` applies to sum_then_normalize only.

  Returns:
    float32[prompts, rollouts], without gradient.

  Raises:
    ValueError: `weights` has a name that `rewards` does not have.
  """
  unknown = set(weights) - set(rewards)
  if unknown:
    raise ValueError(f"reward weights name {sorted(unknown)}, rewards are {sorted(rewards)}")
  if options.aggregation == "sum_then_normalize":
    return group_advantages(jnp.asarray(sum(weight * rewards[name] for name, weight in weights.items())), options)
  each = dataclasses.replace(options, scale="group", clip=0.0)
  total = jnp.asarray(sum(weight * group_advantages(rewards[name], each) for name, weight in weights.items()))
  has_reward = jnp.any(jnp.stack([jnp.isfinite(rewards[name]) for name in weights]), axis=0)
  _, std = _moments(total, has_reward, None, options.is_unbiased)
  return _clip(total / (std + options.eps), options)


def zero_std_fraction(rewards: jax.Array) -> jax.Array:
  """Fraction of groups without learning signal, all finite rewards equal: float32[prompts, rollouts] -> float32[]."""
  return jnp.mean(_is_constant(rewards).astype(jnp.float32))
