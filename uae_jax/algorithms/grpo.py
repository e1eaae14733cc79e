"""Token objectives: the GRPO family as a token term and a normalizer, both exact under microbatching and sharding.

With D_t = log p_t - log p_old_t, r_t = e^(D_t) at token level or r = e^(mean_t D_t) at sequence level (GSPO), mask m,
|o| = sum_t m_t:

    loss      token term                                   sum over rollouts of     divided by
    grpo      -min(min(r, delta) A, clip(r) A)             sum_t m l / |o|          rollouts
    bnpo      the same                                     sum_t m l                tokens
    dapo      the same                                     sum_t m l                tokens
    dr_grpo   the same                                     sum_t m l                rollouts * budget
    luspo     the same, with the sequence ratio            sum_t m l                rollouts
    cispo     -sg(min(r, ratio_cap)) A log p               sum_t m l                tokens
    sapo      -(4 / tau) sigmoid(tau (r - 1)) A            sum_t m l / |o|          rollouts
    vespo     -sg(phi(w)) A log p                          sum_t m l                tokens

where vespo's w = exp(sum_t m D_t) is the ratio of whole captions, clipped to [1e-8, e^20], and enters through the
gamma-shaped phi(w) = e^(lambda (1 - w)) w^k with phi(1) = 1.

For a sampler whose log-probabilities q_t differ from those of replay, c_t = p_old_t / q_t corrects each token, clipped
to [sampling_floor, sampling_cap] ("token_truncate") or 0 outside of it ("token_mask"). It multiplies the token term; in
vespo it is a factor of w instead, which becomes p / q.

The last two columns are a `Loss(sum, count)`. Both add over microbatches and devices. The count depends on masks alone,
so the `denominator` of a whole batch is known before its update. In other libraries bnpo averages over a device's own
microbatch and dapo over all tokens of an optimizer step; with exact accumulation they are equal, and both names are
accepted. Fully masked rollouts count as rollouts. KL and entropy are added to the token term before this reduction.

Sources: GRPO arXiv 2402.03300; DAPO 2503.14476; Dr. GRPO 2503.20783; CISPO (MiniMax-M1) 2506.13585; GSPO 2507.18071;
SAPO 2511.20347; VESPO and the off-policy mask (DeepSeek-V3.2 section 3.1) in the form of TRL; names and aggregation as
in TRL 1.16 GRPOTrainer (its "bnpo" is not the Beta normalisation of the paper BNPO).
"""

import math

import jax
import jax.numpy as jnp

from uae_jax.algorithms import kl as kl_functions
from uae_jax.algorithms.losses import Loss, at_least_float32, clipped_surrogate, need, sum_and_count
from uae_jax.options import TokenObjective

BY_ROLLOUT = ("grpo", "sapo")
BY_TOKEN = ("bnpo", "dapo", "cispo", "vespo")
MIN_LOG_SEQUENCE_RATIO = math.log(1e-8)


def effective_mask(objective: TokenObjective, mask: jax.Array, is_closed: jax.Array | None = None) -> jax.Array:
  """The mask as float32[prompts, rollouts, L], zero for truncated rollouts if truncation = "mask"."""
  mask = mask.astype(jnp.float32)
  if objective.truncation != "mask":
    return mask
  if is_closed is None:
    raise ValueError("truncation = 'mask' needs is_closed")
  return mask * is_closed.astype(mask.dtype)[..., None]


def _token_weights(loss: str, mask: jax.Array) -> jax.Array:
  """The factor of each token term in the numerator."""
  if loss in BY_ROLLOUT:
    return mask / jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)
  return mask


def denominator(objective: TokenObjective, mask: jax.Array, is_closed: jax.Array | None = None) -> jax.Array:
  """The count of `token_objective`, from masks alone; that of a batch is the sum over its microbatches.

  Args:
    objective: static options.
    mask: [prompts, rollouts, L]; L is the token budget of dr_grpo.
    is_closed: [prompts, rollouts], whether a rollout ended with a closing token; required by truncation = "mask".

  Returns:
    float32[].
  """
  mask = effective_mask(objective, mask, is_closed)
  if objective.loss in BY_TOKEN:
    return jnp.sum(mask)
  rollouts = mask.shape[0] * mask.shape[1]
  return jnp.asarray(rollouts * (mask.shape[2] if objective.loss == "dr_grpo" else 1), mask.dtype)


def entropy_threshold(entropy: jax.Array, mask: jax.Array, top_entropy: float) -> jax.Array:
  """The linearly interpolated (1 - top_entropy) quantile of the entropies where `mask` is set; float32[].

  Source: arXiv 2506.01939; TRL get_high_entropy_mask.
  """
  mask = mask.astype(bool)
  ordered = jnp.sort(jnp.where(mask, entropy, jnp.inf).ravel())
  position = (1 - top_entropy) * jnp.maximum(jnp.sum(mask) - 1, 0)
  below = jnp.floor(position).astype(jnp.int32)
  above = jnp.ceil(position).astype(jnp.int32)
  return ordered[below] + jnp.where(above > below, (position - below) * (ordered[above] - ordered[below]), 0)


def _sampling_correction(
  objective: TokenObjective, old_log_probs: jax.Array, sampling_log_probs: jax.Array
) -> jax.Array:
  """c of the formulas above, [prompts, rollouts, L], without gradient."""
  correction = jnp.exp(kl_functions.clip_log_ratio(jax.lax.stop_gradient(old_log_probs - sampling_log_probs)))
  low, high = objective.sampling_floor, objective.sampling_cap or jnp.inf
  if objective.sampling_correction == "token_truncate":
    return jnp.clip(correction, low, high)
  return jnp.where((correction < low) | (correction > high), 0, correction)


def _vespo_weights(
  objective: TokenObjective, difference: jax.Array, correction: jax.Array | None, advantages: jax.Array
) -> jax.Array:
  """phi(w), [prompts, rollouts, 1], of masked D [prompts, rollouts, L] and advantages [prompts, rollouts, 1]."""
  log_w = jnp.sum(kl_functions.clip_log_ratio(difference), axis=-1, keepdims=True)
  if correction is not None:
    log_c = jnp.clip(jnp.log(correction), MIN_LOG_SEQUENCE_RATIO, kl_functions.MAX_LOG_RATIO)
    log_w = log_w + jnp.sum(log_c, axis=-1, keepdims=True)
  log_w = jnp.clip(log_w, MIN_LOG_SEQUENCE_RATIO, kl_functions.MAX_LOG_RATIO)
  k = jnp.where(advantages > 0, objective.k_positive, objective.k_negative)
  rate = jnp.where(advantages > 0, objective.lambda_positive, objective.lambda_negative)
  return jnp.exp(k * log_w + rate * (1 - jnp.exp(log_w)))


def _policy_term(
  objective: TokenObjective,
  ratio: jax.Array,
  difference: jax.Array,
  log_probs: jax.Array,
  advantages: jax.Array,
  correction: jax.Array | None,
) -> jax.Array:
  """The second column of the table with the sampler's correction, [prompts, rollouts, L]."""
  if objective.loss == "vespo":
    weights = _vespo_weights(objective, difference, correction, advantages)
    return -jax.lax.stop_gradient(weights) * advantages * log_probs
  if objective.loss == "cispo":
    term = -jax.lax.stop_gradient(jnp.minimum(ratio, objective.ratio_cap)) * advantages * log_probs
  elif objective.loss == "sapo":
    tau = jnp.where(advantages > 0, objective.temperature_positive, objective.temperature_negative)
    term = -4 / tau * jax.nn.sigmoid(tau * (ratio - 1)) * advantages
  else:
    term = clipped_surrogate(ratio, advantages, objective.clip_low, objective.clip_high, objective.delta)
  return term if correction is None else term * correction


def _is_clipped(objective: TokenObjective, ratio: jax.Array, advantages: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(below, above): where the ratio is past a bound and the bound is active for the sign of the advantage."""
  never = jnp.zeros(jnp.broadcast_shapes(ratio.shape, advantages.shape), bool)
  if objective.loss in ("sapo", "vespo"):
    return never, never
  if objective.loss == "cispo":
    return never, (ratio > objective.ratio_cap) & (advantages > 0)
  low = (ratio < 1 - objective.clip_low) & (advantages < 0)
  return low, (ratio > 1 + objective.clip_high) & (advantages > 0)


def token_objective(
  objective: TokenObjective,
  log_probs: jax.Array,
  old_log_probs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  *,
  reference_log_probs: jax.Array | None = None,
  exact_kl: jax.Array | None = None,
  entropy: jax.Array | None = None,
  entropy_threshold_value: jax.Array | None = None,
  sampling_log_probs: jax.Array | None = None,
  is_closed: jax.Array | None = None,
) -> tuple[Loss, dict[str, tuple[jax.Array, jax.Array]]]:
  """Numerator and denominator of the loss of a batch or microbatch.

      l_t = policy term with sampler correction * top-entropy mask + beta KL_t - entropy_bonus H_t

  KL_t is weighted by the token's ratio, see `kl.weighted`, unless `is_kl_weighted` is off or kl = "exact".

  Args:
    objective: static options.
    log_probs: float32[prompts, rollouts, L], differentiated.
    old_log_probs: float32[prompts, rollouts, L]; on policy, `stop_gradient(log_probs)`, so the ratio is exactly 1.
    advantages: float32[prompts, rollouts].
    mask: [prompts, rollouts, L], nonzero at sampled tokens, including the closing token.
    reference_log_probs: float32[prompts, rollouts, L]; required by beta with an estimator.
    exact_kl: float32[prompts, rollouts, L], see `kl.exact`; required by beta with kl = "exact".
    entropy: float32[prompts, rollouts, L]; required by `entropy_bonus` and `top_entropy`, otherwise only a metric.
    entropy_threshold_value: float32[], `entropy_threshold` of the whole batch; None computes it from this microbatch.
    sampling_log_probs: float32[prompts, rollouts, L], as measured by the sampler; required by `sampling_cap`,
      `sampling_floor` and `off_policy_threshold`.
    is_closed: [prompts, rollouts], whether a rollout ended with a closing token; required by truncation = "mask".

  Returns:
    (Loss, metrics name -> (sum, count)). `ratio_variance` is the mean of (r - 1)^2, `approximate_kl` the mean of
    D^2 / 2; `policy_loss` is the loss without KL and entropy.

  Raises:
    ValueError: an option lacks its argument.
  """
  log_probs = at_least_float32(log_probs)
  mask = effective_mask(objective, mask, is_closed).astype(log_probs.dtype)
  advantages = jax.lax.stop_gradient(advantages)[..., None]

  def kept(x):
    return None if x is None else jnp.where(mask > 0, x, 0)

  # Padding may hold any value, including infinities, which must not reach the loss or its gradient.
  log_probs, old_log_probs, entropy, exact_kl = map(kept, (log_probs, old_log_probs, entropy, exact_kl))
  reference_log_probs, sampling_log_probs = map(kept, (reference_log_probs, sampling_log_probs))
  difference = log_probs - jax.lax.stop_gradient(old_log_probs)
  token_ratio = ratio = jnp.exp(kl_functions.clip_log_ratio(difference))
  if objective.importance_level == "sequence":
    lengths = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)
    log_ratio = jnp.sum(mask * difference, axis=-1, keepdims=True) / lengths
    ratio = jnp.broadcast_to(jnp.exp(kl_functions.clip_log_ratio(log_ratio)), difference.shape)

  correction = None
  if objective.corrects_sampler:
    sampled = need(sampling_log_probs, "sampling_cap or sampling_floor", "sampling_log_probs")
    correction = jnp.where(mask > 0, _sampling_correction(objective, old_log_probs, sampled), 1)
  terms = _policy_term(objective, ratio, difference, log_probs, advantages, correction)
  if objective.top_entropy < 1:
    need(entropy, "top_entropy", "entropy")
    threshold = entropy_threshold_value
    if threshold is None:
      threshold = entropy_threshold(entropy, mask, objective.top_entropy)
    terms = terms * jax.lax.stop_gradient(entropy >= threshold)

  if objective.off_policy_threshold:
    drift = mask * (need(sampling_log_probs, "off_policy_threshold", "sampling_log_probs") - log_probs)
    drift = jnp.sum(drift, axis=-1, keepdims=True) / jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)
    terms = terms * jax.lax.stop_gradient((advantages >= 0) | (drift <= objective.off_policy_threshold))

  weights, count = _token_weights(objective.loss, mask), denominator(objective, mask, is_closed)
  low, high = _is_clipped(objective, ratio, advantages)
  metrics = {
    "ratio_mean": sum_and_count(ratio, mask),
    "ratio_variance": sum_and_count(jnp.square(ratio - 1), mask),
    "clip_fraction": sum_and_count(low | high, mask),
    "clip_fraction_low": sum_and_count(low, mask),
    "clip_fraction_high": sum_and_count(high, mask),
    "approximate_kl": sum_and_count(0.5 * jnp.square(difference), mask),
    "policy_loss": (jnp.sum(weights * terms), count),
  }
  if objective.beta:
    if objective.kl == "exact":
      divergence = need(exact_kl, "kl = 'exact'", "exact_kl")
    else:
      reference = jax.lax.stop_gradient(need(reference_log_probs, "beta", "reference_log_probs"))
      divergence = kl_functions.estimate(objective.kl, log_probs, reference)
      if objective.is_kl_weighted:
        divergence = kl_functions.weighted(objective.kl, divergence, token_ratio)
    metrics["kl"] = sum_and_count(divergence, mask)
    terms = terms + objective.beta * divergence
  if entropy is not None:
    metrics["entropy"] = sum_and_count(entropy, mask)
  if objective.entropy_bonus:
    terms = terms - objective.entropy_bonus * need(entropy, "entropy_bonus", "entropy")

  return Loss(jnp.sum(weights * terms), count), metrics
