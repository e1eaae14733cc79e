"""Images from contexts: deterministic sampling (differentiable if asked) and stochastic groups with a window of SDE
steps.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from uae_jax.algorithms import samplers
from uae_jax.algorithms.flow_matching import apply_guidance
from uae_jax.models.uae import UAE
from uae_jax.rollouts.conditioning import Context

Velocity = Callable[[jax.Array, jax.Array], jax.Array]


def velocity_field(model: UAE, context: Context, *, guidance: float = 1.0, negative: Context | None = None) -> Velocity:
  """v(latents, sigma) under classifier-free guidance, both branches in one batch [negative, positive].

  Args:
    model: the UAE.
    context: B rows.
    guidance: 1 runs the conditional branch alone.
    negative: one row, padded to the same number of slots; needed when guidance is not 1.
  """
  if guidance == 1.0:
    return lambda latents, sigma: model.velocity(latents, sigma, context.states, context.mask)
  states = jnp.concatenate([jnp.broadcast_to(negative.states, context.states.shape), context.states])
  mask = jnp.concatenate([jnp.broadcast_to(negative.mask, context.mask.shape), context.mask])

  def guided(latents, sigma):
    sigma = jnp.broadcast_to(sigma, (latents.shape[0],))
    both = model.velocity(jnp.concatenate([latents, latents]), jnp.concatenate([sigma, sigma]), states, mask)
    return apply_guidance(*jnp.split(both, 2), guidance)

  return guided


def sample_ode(
  velocity: Velocity, noise: jax.Array, *, num_steps: int, shift: float, gradient_steps: int = 0
) -> jax.Array:
  """Euler steps along diffusers' schedule.

  Args:
    velocity: v(latents, sigma).
    noise: float32[B, h, w, 16].
    num_steps: N.
    shift: of the schedule; SD3.5 uses 3.
    gradient_steps: the last so many steps are differentiable, each rematerialized; before them gradients stop.

  Returns:
    Latents float32[B, h, w, 16].
  """
  sigmas = jnp.asarray(samplers.sigmas(num_steps, shift))

  def step(latents, pair):
    sigma, sigma_next = pair
    return samplers.ode_step(latents, velocity(latents, sigma), sigma, sigma_next), None

  pairs = (sigmas[:-1], sigmas[1:])
  first = num_steps - gradient_steps
  latents, _ = jax.lax.scan(step, noise, jax.tree.map(lambda x: x[:first], pairs))
  if gradient_steps:
    last = jax.tree.map(lambda x: x[first:], pairs)
    latents, _ = jax.lax.scan(jax.checkpoint(step), jax.lax.stop_gradient(latents), last)
  return latents


@flax.struct.dataclass
class Trajectories:
  """R stochastic samples a prompt; only the window of SDE steps is kept.

  Attributes:
    latents: float32[W + 1, B * R, h, w, 16]; x before each window step and after the last.
    steps: int32[W]; indices into the schedule.
    log_probs: float32[W, B * R]; as measured while sampling.
    final: float32[B * R, h, w, 16].
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
) -> Trajectories:
  """ODE up to the window, SDE inside it, ODE to the end. Source: Flow-GRPO-Fast / MixGRPO; formulas in
  `algorithms.samplers`.

  Args:
    make_velocity: repeat -> v(latents, sigma) for every context repeated so many times in a row.
    noise: float32[B, h, w, 16] if the group shares its initial noise, else float32[B * R, h, w, 16].
    key: noise of the SDE steps.
    window_start: int32[], the same for the whole batch.
    num_rollouts: R.
    is_noise_shared: one initial noise a group; the ODE prefix then runs once a group.
    num_steps: N of the schedule.
    shift: of the schedule.
    window: W, number of SDE steps.
    kind: "flow", "cps" or "dance".
    noise_level: a of the sampler.
  """
  sigmas = jnp.asarray(samplers.sigmas(num_steps, shift))
  grouped = make_velocity(num_rollouts)

  def euler(velocity):
    def step(i, latents):
      return samplers.ode_step(latents, velocity(latents, sigmas[i]), sigmas[i], sigmas[i + 1])

    return step

  prefix = make_velocity(1) if is_noise_shared else grouped
  latents = jax.lax.fori_loop(0, window_start, euler(prefix), noise)
  if is_noise_shared:
    latents = jnp.repeat(latents, num_rollouts, axis=0)

  def stochastic(latents, offset):
    mean, std = sde_moments(grouped, latents, sigmas, window_start + offset, kind, noise_level)
    after = mean + std * jax.random.normal(jax.random.fold_in(key, offset), latents.shape)
    return after, (latents, samplers.log_prob(kind, after, mean, std))

  offsets = jnp.arange(window)
  latents, (before, log_probs) = jax.lax.scan(stochastic, latents, offsets)
  kept = jnp.concatenate([before, latents[None]])
  final = jax.lax.fori_loop(window_start + window, num_steps, euler(grouped), latents)
  return Trajectories(latents=kept, steps=window_start + offsets, log_probs=log_probs, final=final)


def sde_moments(
  velocity: Velocity, latents: jax.Array, sigmas: jax.Array, step: jax.Array, kind: str, noise_level: float
):
  """(mean float32[B, ...], std) of one SDE step; rollout and replay both call this."""
  sigma, sigma_next = sigmas[step], sigmas[step + 1]
  return samplers.sde_step(kind, latents, velocity(latents, sigma), sigma, sigma_next, sigmas[1], noise_level)


def replay(
  velocity: Velocity,
  trajectories: Trajectories,
  *,
  num_steps: int,
  shift: float,
  kind: str,
  noise_level: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Moments and log-probabilities of kept steps under a policy.

  Returns:
    (log_probs float32[W, B], mean float32[W, B, ...], std float32[W]).
  """
  sigmas = jnp.asarray(samplers.sigmas(num_steps, shift))

  def step(inputs):
    before, after, index = inputs
    mean, std = sde_moments(velocity, before, sigmas, index, kind, noise_level)
    return samplers.log_prob(kind, after, mean, std), mean, std

  return one_by_one(step, (trajectories.latents[:-1], trajectories.latents[1:], trajectories.steps))


def one_by_one(function: Callable, xs):
  """`function` of every element along the leading axis, one after the other; without a loop where there is only one.

  Differentiate it only there. JAX moves out of a differentiated loop whatever the backward pass needs and the loop does
  not change, past every `jax.checkpoint` in it: with frozen weights, those of all layers, gathered.

  Args:
    function: element -> pytree.
    xs: pytree whose leaves lead with one axis.
  """
  if jax.tree.leaves(xs)[0].shape[0] > 1:
    return jax.lax.map(function, xs)
  return jax.tree.map(lambda y: y[None], function(jax.tree.map(lambda x: x[0], xs)))
