"""Interface of an image policy of stage 3: how it samples images, what it records, and its loss on the record."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from uae_jax.algorithms.losses import Loss
from uae_jax.rollouts.images import Velocity


@dataclasses.dataclass(frozen=True)
class Fields:
  """Velocity fields over prompts * rollouts rows, with the rollouts of a prompt in consecutive rows.

  Made by the update of stage 3, once per part of a microbatch; read by `ImagePolicy.loss`.

  Attributes:
    policy: velocity field of the policy that learns.
    reference: () -> velocity field of the reference policy; called only by a loss that needs it.
  """

  policy: Velocity
  reference: Callable[[], Velocity]


@dataclasses.dataclass(frozen=True)
class ImagePolicy:
  """Sampler and loss of one family of stage 3 objectives.

  Made by `sde_policy.make_policy` (Flow-GRPO) and `forward_policy.make_policy` (DiffusionNFT, AWM); read by the rollout
  and the update of stage 3. `record` is the family's own record of a rollout: `sde_policy.Steps` or
  `forward_policy.Noised`.

  Attributes:
    sample: (repeat -> velocity, noise, key, step, piece) -> (final latents float32[prompts, rollouts, h, w, 16],
      record); piece as in `Phases.rollout`, None for a step in one piece.
      Noise has one row per prompt if the stage's `is_noise_shared` is set, else one per rollout. The first axis of
      every leaf of `record` is prompts, so that minibatches are split between groups.
    record_old_policy: (velocity of the policy that sampled, record) -> record with the old-policy values.
    loss: (fields, record, i, advantages float32[prompts, rollouts], old) -> (`Loss`, metrics name -> (sum, count)) of
      point i int32[] only; old: (stored, current) -> old-policy values, see `update.UpdateContext.old`.
    num_points: number of points per image at which the loss is evaluated; the loss of an image is their sum.
    record_average_policy: (velocity of the slow average, record) -> record with the slow average's values; None if
      `loss` does not use them.
  """

  sample: Callable[..., tuple[jax.Array, Any]]
  record_old_policy: Callable[[Velocity, Any], Any]
  loss: Callable[[Fields, Any, jax.Array, jax.Array, Callable], tuple[Loss, dict]]
  num_points: int
  record_average_policy: Callable[[Velocity, Any], Any] | None = None


def by_prompt(x: jax.Array, axis: int, num_rollouts: int) -> jax.Array:
  """Splits axis `axis` and moves prompts first: [..., prompts * rollouts, ...] -> [prompts, ..., rollouts, ...]."""
  x = x.reshape(*x.shape[:axis], -1, num_rollouts, *x.shape[axis + 1 :])
  return jnp.moveaxis(x, axis, 0)


def flat(x: jax.Array, axis: int) -> jax.Array:
  """The inverse of `by_prompt`."""
  x = jnp.moveaxis(x, 0, axis)
  return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
