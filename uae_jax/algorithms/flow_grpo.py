"""Flow-GRPO: the policy gradient of stochastic sampling steps, over a window of steps and a group of samples.

With D = log p - log p_old (each a mean over elements), std s of the step, b = mean |mu - mu_old|^2 / (2 s^2):

    ratio         "plain"        r = e^D
                  "guard"        r = e^((D + b) s), RatioNorm: its logarithm, mean((mu - mu_old) z), has mean zero and
                                 the same scale at all steps, so one clip range fits them all
    trust region  "clip"         -min(r A, clip(r) A)
                  "divergence"   -r A, and 0 where b >= threshold and the step would move r further from 1
    step weight   "uniform"      1
                  "noise"        s / mean s
                  "inverse_dt"   1 / (sigma - sigma')
    KL            see `kl.flow`

All four choices are independent. The loss is the mean over steps, prompts and rollouts.

Sources: Flow-GRPO arXiv 2505.05470; GRPO-Guard 2510.22319 ("guard", "inverse_dt"); TempFlow-GRPO 2508.04324 ("noise");
Flow-DPPO 2606.11025 ("divergence"), all as implemented by their authors.
"""

import jax
import jax.numpy as jnp

from uae_jax.algorithms import kl as kl_functions
from uae_jax.algorithms.losses import (
  Loss,
  at_least_float32,
  clipped_surrogate,
  expand,
  mean_square,
  need,
  require,
  sum_and_count,
)
from uae_jax.options import ImageObjective
from uae_jax.options.objectives import SDE_LOSSES


def _divergence(mean: jax.Array, old_mean: jax.Array, std: jax.Array) -> jax.Array:
  """b = mean |mu - mu_old|^2 / (2 s^2), float32[W, prompts, rollouts]."""
  square = mean_square(at_least_float32(mean) - jax.lax.stop_gradient(old_mean), 3)
  return square / expand(2 * jnp.square(std), square)


def _step_weights(step_weight: str, std: jax.Array, change: jax.Array, mean_std: jax.Array | None) -> jax.Array:
  """The step weights of the table above, float32[W]."""
  if step_weight == "noise":
    return std / (jnp.mean(std) if mean_std is None else mean_std)
  if step_weight == "inverse_dt":
    return -1 / change
  return jnp.ones_like(std)


def flow_objective(
  objective: ImageObjective,
  *,
  log_probs: jax.Array,
  old_log_probs: jax.Array,
  advantages: jax.Array,
  std: jax.Array,
  sigma: jax.Array,
  sigma_next: jax.Array,
  mean: jax.Array | None = None,
  old_mean: jax.Array | None = None,
  reference_mean: jax.Array | None = None,
  velocity_scale: jax.Array | None = None,
  mean_std: jax.Array | None = None,
) -> tuple[Loss, dict[str, tuple[jax.Array, jax.Array]]]:
  """Numerator and denominator of the loss of a batch or microbatch; the denominator is W * prompts * rollouts.

  Args:
    objective: static options.
    log_probs: float32[W, prompts, rollouts], differentiated.
    old_log_probs: float32[W, prompts, rollouts]; on policy, `stop_gradient(log_probs)`, so the ratio is exactly 1.
    advantages: float32[prompts, rollouts].
    std: float32[W], standard deviation of each step of the window.
    sigma: float32[W], noise level before each step.
    sigma_next: float32[W], noise level after each step.
    mean: float32[W, prompts, rollouts, ...], differentiated; required by "guard", "divergence" and beta.
    old_mean: `mean` under the policy that sampled; required by "guard" and "divergence".
    reference_mean: `mean` under the reference policy; required by beta.
    velocity_scale: float32[W], see `samplers.velocity_scale`; required by kl = "velocity".
    mean_std: float32[], see `samplers.mean_std`, for step_weight = "noise"; None uses the mean over the window.

  Returns:
    (Loss, metrics name -> (sum, count)). Names ending in `_step<i>` cover window step i alone. `ratio_variance` is the
    mean of (r - 1)^2, `approximate_kl` the mean of D^2 / 2; `policy_loss` is the loss without the KL.

  Raises:
    ValueError: the loss belongs to `forward_process`, or an option lacks its argument.
  """
  require("loss", objective.loss, SDE_LOSSES)
  change = sigma_next - sigma
  advantages = jnp.broadcast_to(jax.lax.stop_gradient(advantages), log_probs.shape)
  difference = at_least_float32(log_probs) - jax.lax.stop_gradient(old_log_probs)
  divergence = None if mean is None or old_mean is None else _divergence(mean, old_mean, std)

  log_ratio = difference
  if objective.ratio == "guard":
    divergence = need(divergence, "ratio = 'guard'", "mean and old_mean")
    log_ratio = (difference + divergence) * expand(std, difference)
  ratio = jnp.exp(kl_functions.clip_log_ratio(log_ratio))

  clip_low, clip_high = objective.clip_range
  low, high = (ratio < 1 - clip_low) & (advantages < 0), (ratio > 1 + clip_high) & (advantages > 0)
  if objective.trust_region == "clip":
    policy = clipped_surrogate(ratio, advantages, clip_low, clip_high)
  else:
    divergence = need(divergence, "trust_region = 'divergence'", "mean and old_mean")
    is_far = jax.lax.stop_gradient(divergence) >= objective.divergence_threshold
    low, high = is_far & (ratio < 1) & (advantages < 0), is_far & (ratio > 1) & (advantages > 0)
    policy = jnp.where(low | high, 0, -ratio * advantages)
  weights = _step_weights(objective.step_weight, std, change, mean_std)
  terms = policy * expand(weights, policy)

  values = {
    "ratio_mean": ratio,
    "ratio_variance": jnp.square(ratio - 1),
    "clip_fraction": low | high,
    "clip_fraction_low": low,
    "clip_fraction_high": high,
    "approximate_kl": 0.5 * jnp.square(difference),
    "log_ratio_abs": jnp.abs(difference),
    "policy_loss": terms,
  }
  if objective.beta:
    if mean is None or reference_mean is None:
      raise ValueError("beta needs mean and reference_mean")
    values["kl"] = kl_functions.flow(
      objective.kl,
      mean,
      jax.lax.stop_gradient(reference_mean),
      std=std,
      change=change,
      velocity_scale=velocity_scale,
    )
    terms = terms + objective.beta * values["kl"]

  metrics = {name: sum_and_count(value) for name, value in values.items()}
  for name in ("ratio_mean", "ratio_variance", "clip_fraction", "log_ratio_abs"):
    metrics |= {f"{name}_step{i}": sum_and_count(values[name][i]) for i in range(len(log_probs))}
  return Loss(*sum_and_count(terms)), metrics
