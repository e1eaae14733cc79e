"""Objectives that need neither SDE nor trajectory: they noise the finished samples again, as in pre-training.

DiffusionNFT pulls towards good samples and pushes away from bad ones through an implicit negative policy:

    x_s = (1 - sigma) x + sigma noise,   p = 1/2 + clip(A / A_max, -1, 1) / 2
    v+ = beta v + (1 - beta) v_old,      v- = (1 + beta) v_old - beta v,      x+- = x_s - sigma v+-
    w+- = sg mean |x+- - x|, at least 1e-5
    L = (A_max / beta) (p mean (x+ - x)^2 / w+  +  (1 - p) mean (x- - x)^2 / w-)

AWM is a policy gradient whose log-probability is the flow-matching loss at one (noise, sigma), the same for old and new
policy:

    log p = -w(sigma) mean (v - (noise - x))^2,   L = -min(r A, clip(r) A),   r = e^(log p - log p_old)

Both take the KL to the reference in velocity space. Sources: DiffusionNFT arXiv 2509.16117; AWM arXiv 2509.25050; in
the form of Flow-Factory and verl-omni.
"""

import dataclasses

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

KINDS = ("nft", "awm")
AWM_WEIGHTS = ("uniform", "sigma", "sigma_square", "ghuber")


@dataclasses.dataclass(frozen=True)
class ForwardObjective:
  """Static options.

  Attributes:
    kind: "nft" or "awm".
    mix: beta of nft, how far v+ and v- lie from the old policy; 1 in Flow-Factory, 0.5 in verl-omni.
    max_advantage: A_max of nft.
    weight: w of awm: 1, sigma, sigma^2, or "ghuber", with log p = -sigma ((mean + 1e-10)^(1/4) - 1e-10^(1/4)) / (1/4).
    clip_low: of awm.
    clip_high: of awm.
    old_beta: weight of mean (v - v_old)^2, v_old being the slow average; awm collapses without it or the clip.
    beta: weight of mean (v - v_ref)^2; 0 needs no reference.
  """

  kind: str = "nft"
  mix: float = 1.0
  max_advantage: float = 5.0
  weight: str = "uniform"
  clip_low: float = 1.0
  clip_high: float = 1.0
  old_beta: float = 0.0
  beta: float = 0.0

  def __post_init__(self):
    require("kind", self.kind, KINDS)
    require("weight", self.weight, AWM_WEIGHTS)
    if self.mix <= 0:
      raise ValueError(f"mix = {self.mix}: expected more than 0")


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
) -> jax.Array:
  """L of DiffusionNFT for every sample, float32[batch]; arguments as `forward_objective`."""
  noised = interpolate(x, noise, sigma)
  old_velocity = jax.lax.stop_gradient(old_velocity)

  def distance(mixed):
    error = noised - expand(sigma, x) * mixed - x
    scale = jnp.mean(jnp.abs(error), axis=tuple(range(1, x.ndim)))
    return mean_square(error) / jax.lax.stop_gradient(jnp.maximum(scale, 1e-5))

  preference = 0.5 + 0.5 * jnp.clip(advantages / max_advantage, -1, 1)
  positive = distance(mix * velocity + (1 - mix) * old_velocity)
  negative = distance((1 + mix) * old_velocity - mix * velocity)
  return (preference * positive + (1 - preference) * negative) * max_advantage / mix


def awm_log_prob(velocity: jax.Array, x: jax.Array, noise: jax.Array, sigma: jax.Array, weight: str) -> jax.Array:
  """log p of AWM, float32[batch]; arguments as `forward_objective`."""
  require("weight", weight, AWM_WEIGHTS)
  error = mean_square(velocity - velocity_target(x, noise))
  if weight == "ghuber":
    power, eps = 0.25, 1e-10
    return -((error + eps) ** power - eps**power) * sigma / power
  return -error * {"uniform": jnp.ones_like(sigma), "sigma": sigma, "sigma_square": jnp.square(sigma)}[weight]


def forward_objective(
  objective: ForwardObjective,
  *,
  velocity: jax.Array,
  old_velocity: jax.Array,
  x: jax.Array,
  noise: jax.Array,
  sigma: jax.Array,
  advantages: jax.Array,
  reference_velocity: jax.Array | None = None,
) -> tuple[Loss, dict[str, tuple[jax.Array, jax.Array]]]:
  """Numerator and denominator of the loss of a (micro-)batch; the denominator is the number of samples.

  Args:
    objective: static options.
    velocity: float[batch, ...] at `interpolate(x, noise, sigma)`, differentiated.
    old_velocity: the same of the policy that sampled, or of its slow average.
    x: float32[batch, ...], finished samples (latents).
    noise: float32[batch, ...].
    sigma: float32[batch].
    advantages: float32[batch].
    reference_velocity: the same of the reference; for beta.

  Returns:
    (Loss, metrics name -> (sum, count)).

  Raises:
    ValueError: beta without reference.
  """
  velocity, x, noise = at_least_float32(velocity), at_least_float32(x), at_least_float32(noise)
  old_velocity = jax.lax.stop_gradient(at_least_float32(old_velocity))
  advantages = jax.lax.stop_gradient(advantages)
  old_distance = mean_square(velocity - old_velocity)
  metrics = {"old_distance": sum_and_count(old_distance)}
  if objective.kind == "nft":
    options = dict(mix=objective.mix, max_advantage=objective.max_advantage)
    terms = nft_terms(velocity, old_velocity, x, noise, sigma, advantages, **options)
  else:
    difference = awm_log_prob(velocity, x, noise, sigma, objective.weight)
    difference = difference - awm_log_prob(old_velocity, x, noise, sigma, objective.weight)
    ratio = jnp.exp(clip_log_ratio(difference))
    terms = clipped_surrogate(ratio, advantages, objective.clip_low, objective.clip_high)
    low, high = ratio < 1 - objective.clip_low, ratio > 1 + objective.clip_high
    metrics["ratio_mean"] = sum_and_count(ratio)
    metrics["ratio_variance"] = sum_and_count(jnp.square(ratio - 1))
    metrics["clip_fraction"] = sum_and_count((low & (advantages < 0)) | (high & (advantages > 0)))
  terms = terms + objective.old_beta * old_distance
  if objective.beta:
    if reference_velocity is None:
      raise ValueError("beta needs reference_velocity")
    divergence = mean_square(velocity - jax.lax.stop_gradient(at_least_float32(reference_velocity)))
    metrics["kl"] = sum_and_count(divergence)
    terms = terms + objective.beta * divergence
  return Loss(*sum_and_count(terms)), metrics
