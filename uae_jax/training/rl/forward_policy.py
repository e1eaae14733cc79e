"""Stage 3 with DiffusionNFT or AWM: images from any sampler, and a loss on the finished images noised again."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from uae_jax.algorithms import flow_matching, forward_process
from uae_jax.options import ImageObjective, UnderstandingForGenerationOptions
from uae_jax.options.reinforcement import ODE
from uae_jax.rollouts.images import one_by_one, sample_ode
from uae_jax.training.rl import sde_policy
from uae_jax.training.rl.pieces import piece_key
from uae_jax.training.rl.policy import Fields, ImagePolicy, by_prompt, flat


@flax.struct.dataclass
class Noised:
  """Finished images and the T noised points per image at which the loss is evaluated.

  Made by `sample` of `make_policy`, and completed by its `record_old_policy` and `record_average_policy`; read by its
  `loss`. Carried in `ImageGroups.record`.

  Attributes:
    x: float32[prompts, 1, rollouts, h, w, 16], finished latents.
    noise: float32[prompts, T, rollouts, h, w, 16], noise mixed into `x` at each point.
    sigma: float32[prompts, T, rollouts], noise level of each point in [0, 1].
    old_velocity: float32[prompts, T, rollouts, h, w, 16] under the policy that sampled, or None when on policy.
    average_velocity: float32[prompts, T, rollouts, h, w, 16] under the slow average, or None if the loss does not use
      it.
  """

  x: jax.Array
  noise: jax.Array
  sigma: jax.Array
  old_velocity: jax.Array | None = None
  average_velocity: jax.Array | None = None

  def at(self, i: jax.Array) -> "Noised":
    """Selects point i of every image; the axis T has length 1 afterwards."""

    def cut(x):
      return None if x is None else jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1)

    return Noised(self.x, *map(cut, (self.noise, self.sigma, self.old_velocity, self.average_velocity)))


def make_policy(options: UnderstandingForGenerationOptions, objective: ImageObjective) -> ImagePolicy:
  """Makes the image policy of DiffusionNFT and AWM.

  Args:
    options: options of stage 3.
    objective: objective of stage 3, with loss "nft" or "awm".
  """
  low, high = options.noising_range
  num_rollouts = options.num_rollouts
  sample_images = None if options.sampler == ODE else sde_policy.make_sampler(options)

  def sample(velocity_of, noise, key, step, piece=None):
    sample_key, noise_key, sigma_key = jax.random.split(key, 3)
    noise_key, sigma_key = piece_key(noise_key, piece), piece_key(sigma_key, piece)
    if sample_images is None:
      shift = options.shift_at(noise.shape)
      latents = sample_ode(velocity_of(num_rollouts), noise, num_steps=options.sampler_steps, shift=shift)
      final = by_prompt(latents, 0, num_rollouts)
    else:
      final = by_prompt(sample_images(velocity_of, noise, sample_key, step, piece).final, 0, num_rollouts)
    points = (final.shape[0], options.noising_points, num_rollouts)
    u = flow_matching.sample_sigmas(sigma_key, points, density=options.noising_density, shift=1.0)
    sigma = flow_matching.shift_sigmas(low + (high - low) * u, options.shift_at(final.shape))
    return final, Noised(final[:, None], jax.random.normal(noise_key, (*points, *final.shape[2:])), sigma)

  def velocities(velocity, record: Noised):
    """Evaluates the velocity at all points, one after the other: float32[T, prompts * rollouts, h, w, 16]."""
    x = flat(record.x, 1)[0]

    def at_point(point):
      noise, sigma = point
      return velocity(flow_matching.interpolate(x, noise, sigma), sigma)

    return one_by_one(at_point, (flat(record.noise, 1), flat(record.sigma, 1)))

  def record_old_policy(velocity, record: Noised):
    return dataclasses.replace(record, old_velocity=by_prompt(velocities(velocity, record), 1, num_rollouts))

  def record_average_policy(velocity, record: Noised):
    return dataclasses.replace(record, average_velocity=by_prompt(velocities(velocity, record), 1, num_rollouts))

  def loss(fields: Fields, record: Noised, i, advantages, old):
    record = record.at(i)

    def joined(x):
      """[T, prompts * rollouts, ...] -> [T * prompts * rollouts, ...]."""
      return x.reshape(-1, *x.shape[2:])

    def rows(x):
      """[prompts, T, rollouts, ...] -> [T * prompts * rollouts, ...]."""
      return joined(flat(x, 1))

    velocity = joined(velocities(fields.policy, record))
    stored = None if record.old_velocity is None else rows(record.old_velocity)
    reference = joined(velocities(fields.reference(), record)) if objective.beta else None
    return forward_process.forward_objective(
      objective,
      velocity=velocity,
      old_velocity=old(stored, velocity),
      x=rows(jnp.broadcast_to(record.x, record.noise.shape)),
      noise=rows(record.noise),
      sigma=rows(record.sigma),
      advantages=rows(jnp.broadcast_to(advantages[:, None], record.sigma.shape)),
      average_velocity=None if record.average_velocity is None else rows(record.average_velocity),
      reference_velocity=reference,
    )

  return ImagePolicy(
    sample, record_old_policy, loss, options.noising_points, record_average_policy if objective.average_beta else None
  )
