"""Objectives that need no SDE and no trajectory: they add noise to the final samples again, as in pretraining.

DiffusionNFT pulls toward good samples and pushes away from bad ones through an implicit negative policy:

    x_s = (1 - sigma) x + sigma noise,   p = 1/2 + clip(A / A_max, -1, 1) / 2
    v+ = beta v + (1 - beta) v_old,      v- = (1 + beta) v_old - beta v,      x+- = x_s - sigma v+-
    w+- = sg mean |x+- - x|, at least 1e-5
    L = (A_max / beta) (p mean (x+ - x)^2 / w+  +  (1 - p) mean (x- - x)^2 / w-)

with advantages A that are first clipped to +-A_max and reduced by the advantage mode:

    all             A                  one_only   1 where A > 0, else 0
    positive_only   max(A, 0)          binary     sign A
    negative_only   min(A, 0)

AWM is a policy gradient whose log-probability is the flow-matching loss at one (noise, sigma), shared by the old and
the new policy:

    log p = -w(sigma) mean (v - (noise - x))^2,   L = -min(r A, clip(r) A),   r = e^(log p - log p_old)

Both use several (noise, sigma) pairs per sample. The KL to the reference, and to a slow average of the policy, is
computed in velocity space. v_old is the velocity of the policy that sampled: the policy before the update, or the slow
average.

Sources: DiffusionNFT arXiv 2509.16117; AWM arXiv 2509.25050; in the form of Flow-Factory and verl-omni.
"""

import jax
import jax.numpy as jnp

from uae_jax.algorithms.flow_matching import interpolate, velocity_target
from uae_jax.algorithms.kl import clip_log_ratio
from uae_jax.algorithms.losses import (
  Loss,
  at_least_float32,
  clipped_surrogate,
  expand,
  mean_square,
  require,
  sum_and_count,
)
from uae_jax.options import ImageObjective
from uae_jax.options.objectives import ADVANTAGE_MODES, AWM_WEIGHTS, FORWARD_LOSSES


def nft_advantages(advantages: jax.Array, mode: str, max_advantage: float) -> jax.Array:
  """A of the formulas above, by mode: float32[batch] -> float32[batch]."""
  require("advantage_mode", mode, ADVANTAGE_MODES)
  clipped = jnp.clip(advantages, -max_advantage, max_advantage)
  if mode == "positive_only":
    return jnp.maximum(clipped, 0)
  if mode == "negative_only":
    return jnp.minimum(clipped, 0)
  if mode == "one_only":
    return (clipped > 0).astype(clipped.dtype)
  return jnp.sign(clipped) if mode == "binary" else clipped


def nft_terms(
  velocity: jax.Array,
  old_velocity: jax.Array,
  x: jax.Array,
  noise: jax.Array,
  sigma: jax.Array,
  advantages: jax.Array,
  *,
  mix: float,
  max_advantage: float,
  advantage_mode: str = "all",
) -> jax.Array:
  """L of DiffusionNFT per sample, float32[batch]; arguments as for `forward_objective`."""
  noised = interpolate(x, noise, sigma)
  old_velocity = jax.lax.stop_gradient(old_velocity)

  def distance(mixed):
    error = noised - expand(sigma, x) * mixed - x
    scale = jnp.mean(jnp.abs(error), axis=tuple(range(1, x.ndim)))
    return mean_square(error) / jax.lax.stop_gradient(jnp.maximum(scale, 1e-5))

  advantages = nft_advantages(advantages, advantage_mode, max_advantage)
  preference = jnp.clip(0.5 + 0.5 * advantages / max_advantage, 0, 1)
  positive = distance(mix * velocity + (1 - mix) * old_velocity)
  negative = distance((1 + mix) * old_velocity - mix * velocity)
  return (preference * positive + (1 - preference) * negative) * max_advantage / mix


def awm_log_ratio(
  velocity: jax.Array, old_velocity: jax.Array, x: jax.Array, noise: jax.Array, sigma: jax.Array, weight: str
) -> jax.Array:
  """log p - log p_old of AWM, float32[batch]; arguments as for `forward_objective`.

  The weight multiplies the difference of the errors: with fused multiply-add, the difference of two weighted errors
  would not be exactly 0 for equal velocities.
  """
  require("weight", weight, AWM_WEIGHTS)
  target = velocity_target(x, noise)
  error, old_error = mean_square(velocity - target), mean_square(old_velocity - target)
  if weight in ("huber", "ghuber"):
    power, factor = (0.5, 1.0) if weight == "huber" else (0.25, 4.0)
    return factor * sigma * ((old_error + 1e-10) ** power - (error + 1e-10) ** power)
  scale = {"uniform": jnp.ones_like(sigma), "sigma": sigma, "sigma_square": jnp.square(sigma)}[weight]
  return scale * (old_error - error)


def forward_objective(
  objective: ImageObjective,
  *,
  velocity: jax.Array,
  old_velocity: jax.Array,
  x: jax.Array,
  noise: jax.Array,
  sigma: jax.Array,
  advantages: jax.Array,
  average_velocity: jax.Array | None = None,
  reference_velocity: jax.Array | None = None,
) -> tuple[Loss, dict[str, tuple[jax.Array, jax.Array]]]:
  """Numerator and denominator of the loss of a batch or microbatch; the denominator is the number of samples.

  Args:
    objective: static options.
    velocity: float[batch, ...] at `interpolate(x, noise, sigma)`, differentiated.
    old_velocity: `velocity` under the policy that sampled; on policy, `stop_gradient(velocity)`.
    x: float32[batch, ...], final samples (latents).
    noise: float32[batch, ...], standard normal.
    sigma: float32[batch], in (0, 1).
    advantages: float32[batch].
    average_velocity: `velocity` under the slow average; required by average_beta.
    reference_velocity: `velocity` under the reference; required by beta.

  Returns:
    (Loss, metrics name -> (sum, count)); `policy_loss` is the loss without the two beta terms, `old_distance` the mean
    of (v - v_old)^2.

  Raises:
    ValueError: the loss belongs to `flow_grpo`, or a beta lacks its velocity.
  """
  require("loss", objective.loss, FORWARD_LOSSES)
  velocity, x, noise = at_least_float32(velocity), at_least_float32(x), at_least_float32(noise)
  old_velocity = jax.lax.stop_gradient(at_least_float32(old_velocity))
  advantages = jax.lax.stop_gradient(advantages)
  metrics = {"old_distance": sum_and_count(mean_square(velocity - old_velocity))}
  if objective.loss == "nft":
    terms = nft_terms(
      velocity,
      old_velocity,
      x,
      noise,
      sigma,
      advantages,
      mix=objective.mix,
      max_advantage=objective.max_advantage,
      advantage_mode=objective.advantage_mode,
    )
  else:
    difference = awm_log_ratio(velocity, old_velocity, x, noise, sigma, objective.weight)
    ratio = jnp.exp(clip_log_ratio(difference))
    clip_low, clip_high = objective.clip_range
    terms = clipped_surrogate(ratio, advantages, clip_low, clip_high)
    low = (ratio < 1 - clip_low) & (advantages < 0)
    high = (ratio > 1 + clip_high) & (advantages > 0)
    metrics |= {
      "ratio_mean": sum_and_count(ratio),
      "ratio_variance": sum_and_count(jnp.square(ratio - 1)),
      "clip_fraction": sum_and_count(low | high),
      "clip_fraction_low": sum_and_count(low),
      "clip_fraction_high": sum_and_count(high),
      "approximate_kl": sum_and_count(0.5 * jnp.square(difference)),
    }
  metrics["policy_loss"] = sum_and_count(terms)
  if objective.average_beta:
    if average_velocity is None:
      raise ValueError("average_beta needs average_velocity")
    distance = mean_square(velocity - jax.lax.stop_gradient(at_least_float32(average_velocity)))
    metrics["average_distance"] = sum_and_count(distance)
    terms = terms + objective.average_beta * distance
  if objective.beta:
    if reference_velocity is None:
      raise ValueError("beta needs reference_velocity")
    divergence = mean_square(velocity - jax.lax.stop_gradient(at_least_float32(reference_velocity)))
    metrics["kl"] = sum_and_count(divergence)
    terms = terms + objective.beta * divergence
  return Loss(*sum_and_count(terms)), metrics
