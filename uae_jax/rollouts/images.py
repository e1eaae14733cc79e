"""Sampling of latents from conditioning: by an ODE, optionally differentiable, and in groups with a few SDE steps."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from uae_jax.algorithms import samplers
from uae_jax.algorithms.flow_matching import apply_guidance
from uae_jax.models.uae import UAE
from uae_jax.rollouts.conditioning import Context
from uae_jax.rollouts.guidance_interval import EVERYWHERE, GuidedInInterval, Interval, Velocity, one_branch, runs


def velocity_field(
  model: UAE,
  context: Context,
  *,
  guidance: float = 1.0,
  negative: Context | None = None,
  interval: Interval = EVERYWHERE,
) -> Velocity:
  """Makes v(latents, sigma) with classifier-free guidance; both branches run in one batch [negative, positive].

  Args:
    model: UAE whose decoder is used.
    context: conditioning, B rows.
    guidance: scale of the guidance; 1 runs the conditional branch only.
    negative: one row, padded to the number of slots of `context`; required unless guidance is 1.
    interval: (low, high); guidance is applied where low < sigma <= high, see `guidance_interval`.

  Raises:
    ValueError: there is guidance, but no `negative`.
  """

  def conditional(latents, sigma):
    return model.velocity(latents, sigma, context.states, context.mask)

  if guidance == 1.0:
    return conditional
  if negative is None:
    raise ValueError(f"guidance = {guidance} needs the conditioning of the negative prompt; 1 needs none")
  states = jnp.concatenate([jnp.broadcast_to(negative.states, context.states.shape), context.states])
  mask = jnp.concatenate([jnp.broadcast_to(negative.mask, context.mask.shape), context.mask])

  def branches(latents, sigma):
    sigma = jnp.broadcast_to(sigma, (latents.shape[0],))
    both = model.velocity(jnp.concatenate([latents, latents]), jnp.concatenate([sigma, sigma]), states, mask)
    negative, positive = jnp.split(both, 2)
    return positive, apply_guidance(negative, positive, guidance)

  field = GuidedInInterval(branches, conditional, interval)
  return field.guided if interval == EVERYWHERE else field


def sample_ode(
  velocity: Velocity, noise: jax.Array, *, num_steps: int, shift: float, gradient_steps: int = 0
) -> jax.Array:
  """Samples latents by Euler steps along the schedule of diffusers.

  Args:
    velocity: v(latents, sigma); guidance in an interval splits the loop over steps where it begins and ends.
    noise: float32[B, h, w, 16], initial latents.
    num_steps: number of Euler steps.
    shift: shift of the schedule towards noise; SD3.5 uses 3.
    gradient_steps: number of final steps that are differentiable, each rematerialized; no gradient flows through the
      steps before them.

  Returns:
    Latents float32[B, h, w, 16].
  """
  levels = samplers.sigmas(num_steps, shift)
  pairs = (jnp.asarray(levels)[:-1], jnp.asarray(levels)[1:])

  def advance(latents, first, last, transform=lambda step: step):
    for start, stop, branch in runs(velocity, levels, first, last):

      def step(latents, pair, branch=branch):
        sigma, sigma_next = pair
        return samplers.ode_step(latents, branch(latents, sigma), sigma, sigma_next), None

      latents, _ = jax.lax.scan(transform(step), latents, jax.tree.map(lambda x: x[start:stop], pairs))  # noqa: B023
    return latents

  first = num_steps - gradient_steps
  latents = advance(noise, 0, first)
  if gradient_steps:
    latents = advance(jax.lax.stop_gradient(latents), first, num_steps, jax.checkpoint)
  return latents


def generate(
  model: UAE,
  context: Context,
  negative: Context | None,
  noise: jax.Array,
  *,
  guidance: float,
  sampler_steps: int,
  shift: float,
  gradient_steps: int,
  guidance_interval: Interval,
) -> jax.Array:
  """Samples latents by an ODE and decodes them with the VAE, see `reconstruct.generate`."""
  velocity = velocity_field(model, context, guidance=guidance, negative=negative, interval=guidance_interval)
  return model.decode_latents(
    sample_ode(velocity, noise, num_steps=sampler_steps, shift=shift, gradient_steps=gradient_steps)
  )


@flax.struct.dataclass
class Trajectories:
  """R stochastic samples per prompt; of the trajectory, only the window of W SDE steps is stored.

  Made by `sample_sde`; read by the image policies of stage 3.

  Attributes:
    latents: float32[W + 1, B * R, h, w, 16], before each step of the window and after the last.
    steps: int32[W], indices into the schedule.
    log_probs: float32[W, B * R], computed while sampling.
    final: float32[B * R, h, w, 16], finished latents.
  """

  latents: jax.Array
  steps: jax.Array
  log_probs: jax.Array
  final: jax.Array


def sample_sde(
  make_velocity: Callable[[int], Velocity],
  noise: jax.Array,
  key: jax.Array,
  window_start: jax.Array,
  *,
  num_rollouts: int,
  is_noise_shared: bool,
  num_steps: int,
  shift: float,
  window: int,
  kind: str,
  noise_level: float,
  reach: tuple[int, int] | None = None,
) -> Trajectories:
  """Samples by ODE steps before the window, SDE steps inside it, and ODE steps after it.

  Source: Flow-GRPO-Fast / MixGRPO; formulas in `algorithms.samplers`.

  Args:
    make_velocity: repeat -> v(latents, sigma) with every row of conditioning repeated `repeat` times in a row.
    noise: float32[B, h, w, 16] if the group shares its initial noise, else float32[B * R, h, w, 16].
    key: random key of the noise in the SDE steps.
    window_start: int32[], first SDE step, the same for the whole batch.
    num_rollouts: R.
    is_noise_shared: use one initial noise per group; the steps before the window then run once per group.
    num_steps: number of steps of the schedule.
    shift: shift of the schedule towards noise.
    window: W, number of SDE steps.
    kind: SDE sampler: "flow", "cps" or "dance".
    noise_level: noise level a of the sampler.
    reach: steps [first, last) that the window stays in, known when this is traced; None for all.
  """
  levels = samplers.sigmas(num_steps, shift)
  sigmas = jnp.asarray(levels)
  grouped = make_velocity(num_rollouts)
  reach = reach or (0, num_steps)
  before_window, after_window = ode_steps(reach, window, num_steps)

  def euler(velocity):
    def step(i, latents):
      return samplers.ode_step(latents, velocity(latents, sigmas[i]), sigmas[i], sigmas[i + 1])

    return step

  prefix = make_velocity(1) if is_noise_shared else grouped
  latents = noise
  for first, last, branch in runs(prefix, levels, *before_window):
    latents = jax.lax.fori_loop(first, jnp.minimum(last, window_start), euler(branch), latents)
  if is_noise_shared:
    latents = jnp.repeat(latents, num_rollouts, axis=0)
  in_window = one_branch(grouped, levels[slice(*reach)])

  def stochastic(latents, offset):
    mean, std = sde_moments(in_window, latents, sigmas, window_start + offset, kind, noise_level)
    after = mean + std * jax.random.normal(jax.random.fold_in(key, offset), latents.shape)
    return after, (latents, samplers.log_prob(kind, after, mean, std))

  offsets = jnp.arange(window)
  latents, (before, log_probs) = jax.lax.scan(stochastic, latents, offsets)
  kept = jnp.concatenate([before, latents[None]])
  for first, last, branch in runs(grouped, levels, *after_window):
    latents = jax.lax.fori_loop(jnp.maximum(first, window_start + window), last, euler(branch), latents)
  return Trajectories(latents=kept, steps=window_start + offsets, log_probs=log_probs, final=latents)


def ode_steps(reach: tuple[int, int], window: int, num_steps: int) -> tuple[tuple[int, int], tuple[int, int]]:
  """Steps [first, last) that may come before a window in `reach`, and those that may come after it."""
  return (0, reach[1] - window), (reach[0] + window, num_steps)


def sde_moments(
  velocity: Velocity, latents: jax.Array, sigmas: jax.Array, step: jax.Array, kind: str, noise_level: float
):
  """Computes (mean float32[B, ...], std) of one SDE step; rollout and replay both call this."""
  sigma, sigma_next = sigmas[step], sigmas[step + 1]
  return samplers.sde_step(kind, latents, velocity(latents, sigma), sigma, sigma_next, sigmas[1], noise_level)


def replay(
  velocity: Velocity,
  latents: jax.Array,
  steps: jax.Array,
  *,
  num_steps: int,
  shift: float,
  kind: str,
  noise_level: float,
  reach: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Computes log-probabilities and moments of the stored steps under a policy.

  Args:
    velocity: velocity field of the policy, B rows.
    latents: float32[W + 1, B, h, w, 16], `Trajectories.latents`.
    steps: int32[W], `Trajectories.steps`.
    num_steps: number of steps of the schedule.
    shift: shift of the schedule towards noise.
    kind: SDE sampler: "flow", "cps" or "dance".
    noise_level: noise level a of the sampler.
    reach: as for `sample_sde`.

  Returns:
    (log_probs float32[W, B], mean float32[W, B, ...], std float32[W]).
  """
  levels = samplers.sigmas(num_steps, shift)
  sigmas = jnp.asarray(levels)
  velocity = one_branch(velocity, levels[slice(*(reach or (0, num_steps)))])

  def step(inputs):
    before, after, index = inputs
    mean, std = sde_moments(velocity, before, sigmas, index, kind, noise_level)
    return samplers.log_prob(kind, after, mean, std), mean, std

  return one_by_one(step, (latents[:-1], latents[1:], steps))


def one_by_one(function: Callable, xs):
  """Maps `function` over the leading axis, one element after the other, without a loop if there is only one element.

  Only the case of one element should be differentiated. JAX hoists loop-invariant values that the backward pass needs
  out of a differentiated loop, even past a `jax.checkpoint` inside it: with frozen weights, these are the all-gathered
  weights of all layers.

  Args:
    function: element -> pytree.
    xs: pytree whose leaves all have the same leading axis.
  """
  if jax.tree.leaves(xs)[0].shape[0] > 1:
    return jax.lax.map(function, xs)
  return jax.tree.map(lambda y: y[None], function(jax.tree.map(lambda x: x[0], xs)))
