"""What a stage 3 loss needs: how images are sampled, what is kept of that, and the loss of what was kept."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from uae_jax.algorithms.losses import Loss
from uae_jax.rollouts.images import Velocity


@dataclasses.dataclass(frozen=True)
class Fields:
  """Velocity fields over prompts * rollouts rows, the rollouts of a prompt in a row.

  Attributes:
    policy: of the policy that learns.
    reference: makes that of the reference, called if a loss needs it.
  """

  policy: Velocity
  reference: Callable[[], Velocity]


@dataclasses.dataclass(frozen=True)
class ImagePolicy:
  """
  Attributes:
    sample: (repeat -> velocity, noise, key, step) -> (final latents float32[prompts, rollouts, h, w, 16], kept); noise
      of a row for every prompt or every rollout, as the stage's `is_noise_shared` says. Leaves of `kept` lead with the
      prompts axis, so that minibatches cut between groups.
    record_old_policy: (velocity of the policy that sampled, kept) -> kept with what that policy makes of it.
    loss: (fields, kept, i, advantages float32[prompts, rollouts], old) -> (Loss, metrics name -> (sum, count)) of
      point i int32[] alone; old is (stored, current) -> what the policy that sampled makes of it, see
      `update.UpdateContext.old`.
    num_points: of each image, at which the loss looks; the loss of an image is the sum over them.
    record_average_policy: (velocity of the slow average, kept) -> kept with what that makes of it; None if
      `loss` has no use for it.
  """

  sample: Callable[[Callable[[int], Velocity], jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
  record_old_policy: Callable[[Velocity, Any], Any]
  loss: Callable[[Fields, Any, jax.Array, jax.Array, Callable], tuple[Loss, dict]]
  num_points: int
  record_average_policy: Callable[[Velocity, Any], Any] | None = None


def by_prompt(x: jax.Array, axis: int, num_rollouts: int) -> jax.Array:
  """[..., prompts * rollouts, ...] at `axis` -> [prompts, ..., rollouts, ...]."""
  x = x.reshape(*x.shape[:axis], -1, num_rollouts, *x.shape[axis + 1 :])
  return jnp.moveaxis(x, axis, 0)


def flat(x: jax.Array, axis: int) -> jax.Array:
  """The inverse of `by_prompt`."""
  x = jnp.moveaxis(x, 0, axis)
  return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
