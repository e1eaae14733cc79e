"""Stage 3 with Flow-GRPO: images sampled by an SDE, and the policy gradient of its steps."""

from collections.abc import Sequence
import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from uae_jax.algorithms import flow_grpo, samplers
from uae_jax.algorithms.losses import sum_and_count
from uae_jax.options import ImageObjective, UnderstandingForGenerationOptions
from uae_jax.options.reinforcement import ODE
from uae_jax.rollouts.guidance_interval import spans
from uae_jax.rollouts.images import ode_steps, replay, sample_sde
from uae_jax.training.rl.pieces import piece_key
from uae_jax.training.rl.policy import Fields, ImagePolicy, by_prompt, flat


@flax.struct.dataclass
class Steps:
  """The window of W SDE steps of every image.

  Made by `sample` of `make_policy`, and completed by its `record_old_policy`; read by its `loss`. Carried in
  `ImageGroups.record`.

  Attributes:
    latents: float32[prompts, W + 1, rollouts, h, w, 16], before each step and after the last.
    index: int32[prompts, W], indices into the schedule, the same for all prompts.
    log_probs: float32[prompts, W, rollouts], computed while sampling.
    old_log_probs: float32[prompts, W, rollouts], replayed under the policy that sampled, or None when on policy.
    old_mean: float32[prompts, W, rollouts, h, w, 16], step means of the policy that sampled, or None when on policy.
  """

  latents: jax.Array
  index: jax.Array
  log_probs: jax.Array
  old_log_probs: jax.Array | None = None
  old_mean: jax.Array | None = None

  def at(self, i: jax.Array) -> "Steps":
    """Selects step i of the window; the axis W has length 1 afterwards."""

    def cut(x, length=1):
      return None if x is None else jax.lax.dynamic_slice_in_dim(x, i, length, axis=1)

    kept = (self.index, self.log_probs, self.old_log_probs, self.old_mean)
    return Steps(cut(self.latents, 2), *map(cut, kept))


def make_sampler(options: UnderstandingForGenerationOptions):
  """Makes (repeat -> velocity, noise, key, step, piece) -> `images.Trajectories`.

  All images of a step share one window of SDE steps.
  """

  def sample(velocity_of, noise, key, step, piece):
    window_key, sde_key = jax.random.split(key)
    start = samplers.sde_window(
      step if options.window_strategy == "progressive" else window_key,
      options.window_range,
      options.window_strategy,
      stride=options.window_stride,
      hold=options.window_hold,
    )
    return sample_sde(
      velocity_of,
      noise,
      piece_key(sde_key, piece),
      start,
      num_rollouts=options.num_rollouts,
      is_noise_shared=options.is_noise_shared,
      window=options.window,
      **_sde(options, noise.shape),
    )

  return sample


def window_trips(options, latents_shape: Sequence[int]) -> tuple[float, ...]:
  """Trip counts of the loops of `images.sample_sde`, with the window in the middle of its reach; empty without one.

  The loops are the runs of steps with and without guidance before the window, then those after it.
  """
  if not hasattr(options, "window") or options.sampler == ODE:
    return ()
  levels = samplers.sigmas(options.sampler_steps, options.shift_at(latents_shape))
  before, after = ode_steps(options.window_reach, options.window, options.sampler_steps)
  start = (options.window_reach[0] + before[1]) / 2
  stop = start + options.window
  interval = options.guidance_interval
  return (
    *(max(0.0, min(last, start) - first) for first, last in spans(levels, interval, *before)),
    *(max(0.0, last - max(first, stop)) for first, last in spans(levels, interval, *after)),
  )


def _sde(options: UnderstandingForGenerationOptions, latents_shape: Sequence[int]) -> dict:
  return dict(
    num_steps=options.sampler_steps,
    shift=options.shift_at(latents_shape),
    kind=options.sampler,
    noise_level=options.noise_level,
    reach=options.window_reach,
  )


def make_policy(options: UnderstandingForGenerationOptions, objective: ImageObjective) -> ImagePolicy:
  """Makes the image policy of Flow-GRPO.

  Args:
    options: options of stage 3.
    objective: objective of stage 3, with loss "flow_grpo".
  """
  num_rollouts = options.num_rollouts
  sample_trajectories = make_sampler(options)

  def replay_steps(velocity, steps: Steps):
    """Returns (log_probs [prompts, W, rollouts], mean [prompts, W, rollouts, h, w, 16], std [W])."""
    sde = _sde(options, steps.latents.shape)
    log_probs, mean, std = replay(velocity, flat(steps.latents, 1), steps.index[0], **sde)
    rollouts = steps.latents.shape[2]  # Fewer than num_rollouts if groups are replayed in chunks.
    return by_prompt(log_probs, 1, rollouts), by_prompt(mean, 1, rollouts), std

  def sample(velocity_of, noise, key, step, piece=None):
    sampled = sample_trajectories(velocity_of, noise, key, step, piece)
    final = by_prompt(sampled.final, 0, num_rollouts)
    index = jnp.broadcast_to(sampled.steps, (final.shape[0], options.window))
    latents, log_probs = (by_prompt(x, 1, num_rollouts) for x in (sampled.latents, sampled.log_probs))
    return final, Steps(latents, index, log_probs)

  def record_old_policy(velocity, steps: Steps):
    old_log_probs, old_mean, _ = replay_steps(velocity, steps)
    return dataclasses.replace(steps, old_log_probs=old_log_probs, old_mean=old_mean)

  def loss(fields: Fields, steps: Steps, i, advantages, old):
    steps = steps.at(i)
    log_probs, mean, std = replay_steps(fields.policy, steps)
    reference_mean = None
    if objective.beta:
      reference_mean = jax.lax.stop_gradient(replay_steps(fields.reference(), steps)[1])
    sigmas = samplers.sigmas(options.sampler_steps, options.shift_at(steps.latents.shape))
    at = (jnp.asarray(sigmas)[steps.index[0]], jnp.asarray(sigmas)[steps.index[0] + 1])
    value, metrics = flow_grpo.flow_objective(
      objective,
      log_probs=jnp.swapaxes(log_probs, 0, 1),
      old_log_probs=jnp.swapaxes(old(steps.old_log_probs, log_probs), 0, 1),
      advantages=advantages,
      mean=jnp.swapaxes(mean, 0, 1),
      old_mean=jnp.swapaxes(old(steps.old_mean, mean), 0, 1),
      reference_mean=None if reference_mean is None else jnp.swapaxes(reference_mean, 0, 1),
      std=std,
      sigma=at[0],
      sigma_next=at[1],
      velocity_scale=samplers.velocity_scale(options.sampler, *at, sigmas[1], options.noise_level),
      mean_std=samplers.mean_std(options.sampler, sigmas, options.noise_level),
    )
    difference = jnp.abs(jax.lax.stop_gradient(log_probs) - steps.log_probs)
    metrics["log_prob_difference"] = metrics["log_prob_difference_step0"] = sum_and_count(difference)
    metrics["log_prob_difference_max"] = (jnp.max(difference), jnp.float32(1))
    return value, _at_step(metrics, i, options.window)

  return ImagePolicy(sample, record_old_policy, loss, num_points=options.window)


def _at_step(metrics: dict, i: jax.Array, window: int) -> dict:
  """Renames the `..._step0` metrics of step i to `..._step<i>`; the other steps of the window get sum and count 0."""
  found = {name: pair for name, pair in metrics.items() if not name.endswith("_step0")}
  for name in metrics.keys() - found.keys():
    for step in range(window):
      found[f"{name[:-1]}{step}"] = tuple(jnp.where(i == step, x, 0.0) for x in metrics[name])
  return found
