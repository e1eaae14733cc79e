"""Distances from the reference policy: estimated from log-probabilities, exact from logits, or of Gaussian steps."""

import jax
import jax.numpy as jnp

from uae_jax.algorithms.losses import at_least_float32, expand, mean_square, require

TOKEN_KINDS = ("k1", "k2", "k3", "exact")
FLOW_KINDS = ("gaussian", "gaussian_no_dt", "velocity", "mean")
MAX_LOG_RATIO = 20.0


def clip_log_ratio(log_ratio: jax.Array) -> jax.Array:
  """Clips a log ratio to +-20, where its exponential is finite in float32."""
  return jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def estimate(kind: str, log_probs: jax.Array, reference_log_probs: jax.Array) -> jax.Array:
  """Estimates KL(policy, reference) at samples of the policy, with d = log p_ref - log p clipped to +-20.

      kind   estimate       expected value          expected gradient, as a loss
      k1     -d             KL                      0
      k2     d^2 / 2        not KL                  that of KL(policy, reference)
      k3     e^d - d - 1    KL, never negative      that of KL(reference, policy)

  Differentiated as they stand, neither k1 nor k3 minimizes the KL to the reference, although both estimate it without
  bias: the samples depend on the parameters too. `weighted` gives all three the gradient of KL(policy, reference).

  Source: Schulman, "Approximating KL Divergence" (2020); k3 in GRPO (arXiv 2402.03300).

  Args:
    kind: "k1", "k2" or "k3".
    log_probs: float32[...].
    reference_log_probs: float32[...].

  Returns:
    float32[...].
  """
  require("kl", kind, ("k1", "k2", "k3"))
  d = clip_log_ratio(reference_log_probs - log_probs)
  if kind == "k1":
    return -d
  if kind == "k2":
    return 0.5 * jnp.square(d)
  return jnp.expm1(d) - d


def weighted(kind: str, divergence: jax.Array, ratio: jax.Array) -> jax.Array:
  """Multiplies an estimate by the ratio p / p_old of its own token.

  For k1 and k3 the ratio is differentiated. Its value corrects for samples of an older policy; its gradient matters on
  policy too, where its value is 1: with grad r = r grad log p, the expected gradient of r (e^d - d - 1) is
  E[-d grad log p], which is that of KL(policy, reference). For k2, whose gradient is right without that, it is a
  constant factor.

  Source: DeepSeek-V3.2 (arXiv 2512.02556) section 3.1; TRL 1.16 `use_bias_correction_kl`, on by default. With
  importance_level "sequence", TRL multiplies by the ratio of the sequence instead, whose gradient is that of no KL.

  Args:
    kind: "k1", "k2" or "k3".
    divergence: float32[...], result of `estimate`.
    ratio: float32[...], p / p_old of each token, differentiable.

  Returns:
    float32[...].
  """
  require("kl", kind, ("k1", "k2", "k3"))
  return divergence * (jax.lax.stop_gradient(ratio) if kind == "k2" else ratio)


def exact(logits: jax.Array, reference_logits: jax.Array) -> jax.Array:
  """The exact KL per token, sum_v p_v (log p_v - log p_ref_v): logits float[..., V] -> float32[...]."""
  log_p = jax.nn.log_softmax(at_least_float32(logits))
  log_reference = jax.nn.log_softmax(at_least_float32(reference_logits))
  return jnp.sum(jnp.exp(log_p) * (log_p - log_reference), axis=-1)


def flow(
  kind: str,
  mean: jax.Array,
  reference_mean: jax.Array,
  *,
  std: jax.Array,
  change: jax.Array,
  velocity_scale: jax.Array | None = None,
) -> jax.Array:
  """Distance between two Gaussian steps with equal std, averaged over elements.

      gaussian         |mu - mu_ref|^2 / (2 std^2)   the KL itself; beta about 0.004 in Flow-GRPO
      gaussian_no_dt   |mu - mu_ref|^2 / (2 g^2)     std = g sqrt(sigma - sigma'); Flow-GRPO's choice, beta about 0.04
      velocity         |v - v_ref|^2                 beta about 1e-3 in Flow-Factory
      mean             |mu - mu_ref|^2               beta about 1e-2 in Flow-Factory

  Without dt, late steps weigh more. The std of the cps sampler contains no dt: use "gaussian" with it.

  Source: Flow-GRPO (arXiv 2505.05470) and its authors' code; Flow-Factory.

  Args:
    kind: one of `FLOW_KINDS`, see above.
    mean: float32[W, prompts, rollouts, ...].
    reference_mean: float32[W, prompts, rollouts, ...].
    std: float32[W], standard deviation of each step.
    change: float32[W], sigma' - sigma, negative.
    velocity_scale: float32[W], d mean / d v, see `samplers.velocity_scale`; required by "velocity".

  Returns:
    float32[W, prompts, rollouts].

  Raises:
    ValueError: `kind` is unknown, or is "velocity" without `velocity_scale`.
  """
  require("kl", kind, FLOW_KINDS)
  distance = mean_square(at_least_float32(mean) - at_least_float32(reference_mean), 3)
  if kind == "mean":
    return distance
  if kind == "velocity":
    if velocity_scale is None:
      raise ValueError("kl = 'velocity' needs velocity_scale")
    return distance / expand(jnp.square(velocity_scale), distance)
  distance = distance / expand(2 * jnp.square(std), distance)
  return distance * expand(-change, distance) if kind == "gaussian_no_dt" else distance
