"""Samplers from noise to data: the schedule, the deterministic step, and stochastic steps with log-probabilities.

Every sampler steps from sigma to sigma' < sigma by

    x' = mean + std z
    mean = x + (sigma' - sigma) v + pull x1_hat,   x1_hat = x + (1 - sigma) v, the predicted noise

    kind    pull                              std                             source
    flow    (sigma' - sigma) g^2 / (2 sigma)  g sqrt(sigma - sigma')          Flow-GRPO, arXiv 2505.05470
            with g = a sqrt(sigma / (1 - sigma))
    dance   the same with g = a               the same                        DanceGRPO, arXiv 2505.07818
    cps     sigma' (cos(a pi / 2) - 1)        sigma' sin(a pi / 2)            Flow-CPS, arXiv 2509.05952

cps is usually written mean = (1 - sigma') x0_hat + sqrt(sigma'^2 - std^2) x1_hat. That is equal, because
x + (sigma' - sigma) v = (1 - sigma') x0_hat + sigma' x1_hat. In this form noise level a = 0 gives the Euler step, bit
for bit, for every kind.

Rollout and replay call the same `sde_step` and `log_prob`. Everything is float32: bfloat16 latents bias the ratio by
more than the clip range.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from uae_jax.algorithms.losses import at_least_float32, expand, mean_square, require

KINDS = ("flow", "dance", "cps")
WINDOW_STRATEGIES = ("fixed", "random", "progressive")


def sigmas(num_steps: int, shift: float = 3.0, num_train_steps: int = 1000) -> np.ndarray:
  """The schedule of diffusers' FlowMatchEulerDiscreteScheduler, computed on the host.

  The shift applies twice: the end points are the shifted ends of the training schedule, then the linear interpolation
  between them is shifted again. The last sigma before 0 is therefore shift(shift(1 / 1000)), far below what a single
  shift of linspace(1, 0) gives.

  Source: diffusers 0.42 scheduling_flow_match_euler_discrete.py, __init__ (float32) and set_timesteps (float64, rounded
  once).

  Args:
    num_steps: N.
    shift: see `flow_matching.shift_sigmas`; SD3 and SD3.5 use 3.
    num_train_steps: length of the training schedule.

  Returns:
    float32[N + 1], descending from 1 to 0.
  """
  ends = np.array([1.0, 1.0 / num_train_steps], np.float32)
  ends = np.float32(shift) * ends / (1 + np.float32(shift - 1) * ends)
  line = np.linspace(float(ends[0]) * num_train_steps, float(ends[1]) * num_train_steps, num_steps) / num_train_steps
  line = shift * line / (1 + (shift - 1) * line)
  return np.append(line, 0.0).astype(np.float32)


def ode_step(x: jax.Array, velocity: jax.Array, sigma: jax.Array, sigma_next: jax.Array) -> jax.Array:
  """One Euler step, x + (sigma' - sigma) v.

  Args:
    x: float32[batch, ...].
    velocity: float[batch, ...].
    sigma: float32[] or float32[batch].
    sigma_next: float32[] or float32[batch].
  """
  x = at_least_float32(x)
  return x + expand(sigma_next - sigma, x) * at_least_float32(velocity)


def pull_and_std(
  kind: str, sigma: jax.Array, sigma_next: jax.Array, sigma_first: jax.Array, noise_level: float
) -> tuple[jax.Array, jax.Array]:
  """(pull, std) of the table above, in the shape of `sigma`; they do not depend on x."""
  require("sampler", kind, KINDS)
  if kind == "cps":
    if isinstance(noise_level, int | float) and not 0 <= noise_level <= 1:
      raise ValueError(f"noise_level = {noise_level}: the cps sampler needs 0 to 1")
    angle = noise_level * math.pi / 2
    # cos(angle) - 1 without cancellation.
    return -2 * sigma_next * jnp.square(jnp.sin(angle / 2)), sigma_next * jnp.sin(angle)
  change = sigma_next - sigma
  g: float | jax.Array = noise_level
  if kind == "flow":
    # At sigma = 1 the denominator would be 0; there, as in Flow-GRPO, it uses the schedule's second sigma.
    g = noise_level * jnp.sqrt(sigma / (1 - jnp.where(sigma == 1, sigma_first, sigma)))
  return change * jnp.square(g) / (2 * sigma), g * jnp.sqrt(-change)


def sde_step(
  kind: str,
  x: jax.Array,
  velocity: jax.Array,
  sigma: jax.Array,
  sigma_next: jax.Array,
  sigma_first: jax.Array,
  noise_level: float,
) -> tuple[jax.Array, jax.Array]:
  """Mean and standard deviation of x' given x; see the table above.

  Args:
    kind: "flow", "dance" or "cps".
    x: float32[batch, ...].
    velocity: float[batch, ...], v(x, sigma).
    sigma: float32[] or float32[batch].
    sigma_next: float32[] or float32[batch].
    sigma_first: float32[], sigmas[1] of the schedule; replaces sigma = 1 in the denominator of "flow".
    noise_level: a; published values are 0.7 for flow, 0.8 for cps, 0.3 for dance.

  Returns:
    (mean float32[batch, ...], std in the shape of `sigma`).
  """
  pull, std = pull_and_std(kind, sigma, sigma_next, sigma_first, noise_level)
  x, velocity = at_least_float32(x), at_least_float32(velocity)
  noise = x + (1 - expand(sigma, x)) * velocity
  return ode_step(x, velocity, sigma, sigma_next) + expand(pull, x) * noise, std


def velocity_scale(
  kind: str, sigma: jax.Array, sigma_next: jax.Array, sigma_first: jax.Array, noise_level: float
) -> jax.Array:
  """d mean / d v = sigma' - sigma + pull (1 - sigma), in the shape of `sigma`."""
  pull, _ = pull_and_std(kind, sigma, sigma_next, sigma_first, noise_level)
  return sigma_next - sigma + pull * (1 - sigma)


def mean_std(kind: str, schedule: jax.Array | np.ndarray, noise_level: float) -> jax.Array:
  """Mean std over all steps except the last, which is never trained; float32[].

  Args:
    kind: "flow", "dance" or "cps".
    schedule: float32[N + 1], see `sigmas`.
    noise_level: a.
  """
  schedule = jnp.asarray(schedule)
  return jnp.mean(pull_and_std(kind, schedule[:-2], schedule[1:-1], schedule[1], noise_level)[1])


def log_prob(kind: str, x_next: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
  """Log-probability of a step, averaged over elements; cps omits variance and constants.

      flow, dance   -(x' - mean)^2 / (2 std^2) - log std - log(2 pi) / 2
      cps           -(x' - mean)^2

  Every published clip range refers to the mean over elements, not the sum. No gradient flows through x'. A step with
  std 0 (the last one of cps, all at noise level 0) has no log-probability; the last step of flow and dance is too
  narrow to train on.

  Source: Flow-GRPO (arXiv 2505.05470) and Flow-CPS (arXiv 2509.05952), as implemented by their authors.

  Args:
    kind: "flow", "dance" or "cps".
    x_next: float32[batch, ...].
    mean: float32[batch, ...].
    std: float32[] or float32[batch].

  Returns:
    float32[batch].
  """
  require("sampler", kind, KINDS)
  error = mean_square(jax.lax.stop_gradient(at_least_float32(x_next)) - at_least_float32(mean))
  if kind == "cps":
    return -error
  return -error / (2 * jnp.square(std)) - jnp.log(std) - 0.5 * math.log(2 * math.pi)


def sde_window(
  key_or_step: jax.Array, window_range: tuple[int, int], strategy: str, *, stride: int = 1, hold: int = 1
) -> jax.Array:
  """The first stochastic step of an update, shared by all groups.

  One window per sample would inflate the reward spread within a group and collapse training.

      fixed         first
      random        uniform in [first, last)
      progressive   first + (step // hold) stride  mod  (last - first)

  Source: Flow-GRPO-Fast (random); MixGRPO (arXiv 2507.21802; progressive: stride = window size, hold = updates per
  position).

  Args:
    key_or_step: typed PRNG key for "random", update number int32[] for "progressive"; "fixed" ignores it.
    window_range: (first, last); the window starts in [first, last).
    strategy: one of `WINDOW_STRATEGIES`, see above.
    stride: steps by which a "progressive" window moves.
    hold: updates before a "progressive" window moves.

  Returns:
    int32[].
  """
  require("window_strategy", strategy, WINDOW_STRATEGIES)
  first, last = window_range
  if not 0 <= first < last:
    raise ValueError(f"window_range = {window_range}: expected 0 <= first < last")
  is_key = jnp.issubdtype(jnp.asarray(key_or_step).dtype, jax.dtypes.prng_key)
  if strategy != "fixed" and is_key != (strategy == "random"):
    raise ValueError(f"window_strategy {strategy!r} takes {'a key' if strategy == 'random' else 'the update number'}")
  if strategy == "random":
    return jax.random.randint(key_or_step, (), first, last, jnp.int32)
  if strategy == "progressive":
    return jnp.int32(first + key_or_step // hold * stride % (last - first))
  return jnp.int32(first)
