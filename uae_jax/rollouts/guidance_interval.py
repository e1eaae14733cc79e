"""Classifier-free guidance only in an interval of noise levels: outside of it the conditional branch runs alone.

The schedule is known when a sampler is traced, so its loops are split into runs of steps that need the same branch.

Source: Kynkäänniemi et al. 2024, arXiv 2404.07724.
"""

from collections.abc import Callable, Sequence
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from uae_jax.algorithms.losses import expand
from uae_jax.options.sampling import EVERYWHERE as EVERYWHERE

Velocity = Callable[[jax.Array, jax.Array], jax.Array]
Interval = tuple[float, float]


def is_guided(sigma, interval: Interval):
  """Whether noise levels are inside: low < sigma <= high, bool in the shape of `sigma`."""
  low, high = interval
  return (sigma > low) & (sigma <= high)


def check_schedule(levels: np.ndarray, interval: Interval) -> None:
  """Refuses an interval that guides no step of a schedule.

  Args:
    levels: float32[N + 1], see `samplers.sigmas`.
    interval: (low, high).

  Raises:
    ValueError: all steps would run without guidance.
  """
  if not np.any(is_guided(levels[:-1], interval)):
    shown = ", ".join(f"{level:.3g}" for level in levels[:-1])
    raise ValueError(
      f"guidance_interval = {interval} contains none of the noise levels of the sampler's steps ({shown}): "
      "widen it, or set guidance = 1"
    )


@dataclasses.dataclass(frozen=True)
class GuidedInInterval:
  """v(latents, sigma) with guidance only at noise levels inside the interval.

  Attributes:
    branches: (latents, sigma) -> (conditional velocity, guided velocity), of one batch.
    conditional: (latents, sigma) -> conditional velocity.
    interval: (low, high).
  """

  branches: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
  conditional: Velocity
  interval: Interval

  def guided(self, latents: jax.Array, sigma: jax.Array) -> jax.Array:
    return self.branches(latents, sigma)[1]

  def __call__(self, latents: jax.Array, sigma: jax.Array) -> jax.Array:
    sigma = jnp.asarray(sigma)
    inside = is_guided(sigma, self.interval)
    if not sigma.ndim:
      return jax.lax.cond(inside, self.guided, self.conditional, latents, sigma)
    # Rows with noise levels of their own: both branches run for all of them.
    conditional, guided = self.branches(latents, sigma)
    return jnp.where(expand(inside, guided), guided, conditional)


def runs(velocity: Velocity, levels: np.ndarray, first: int, last: int) -> list[tuple[int, int, Velocity]]:
  """Splits steps [first, last) where guidance begins or ends: (first, last, velocity) of each run.

  Args:
    velocity: result of `images.velocity_field`, or any velocity field, which is not split.
    levels: float32[N + 1], the schedule.
    first: first step.
    last: step after the last one.
  """
  if not isinstance(velocity, GuidedInInterval):
    return [(first, last, velocity)] if first < last else []
  check_schedule(levels, velocity.interval)
  return [(a, b, one_branch(velocity, levels[a:b])) for a, b in spans(levels, velocity.interval, first, last)]


def spans(levels: np.ndarray, interval: Interval, first: int, last: int) -> list[tuple[int, int]]:
  """(first, last) of the runs of steps [first, last), see `runs`."""
  inside = is_guided(levels, interval)
  cuts = [step for step in range(first + 1, last) if inside[step] != inside[step - 1]]
  return list(zip([first, *cuts], [*cuts, last], strict=True)) if first < last else []


def one_branch(velocity: Velocity, levels: Sequence[float] | np.ndarray) -> Velocity:
  """The branch that all these noise levels need; `velocity` itself if they need both."""
  if not isinstance(velocity, GuidedInInterval):
    return velocity
  inside = is_guided(np.asarray(levels), velocity.interval)
  if np.all(inside):
    return velocity.guided
  return velocity if np.any(inside) else velocity.conditional
