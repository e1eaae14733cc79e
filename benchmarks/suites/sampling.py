"""Images from contexts: Euler steps with classifier-free guidance, both branches in one batch, in one scan."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import inputs
from benchmarks.costs import matrix_flops
from benchmarks.sizes import case_name
from benchmarks.suites.ahead import compile_ahead
from benchmarks.timing import Case
from benchmarks.world import World
from uae_jax.rollouts.conditioning import Context
from uae_jax.rollouts.images import sample_ode, velocity_field

SHIFT = 3.0
NEEDS = ("decoder", "pooled")


def contexts(world: World, rows: int) -> tuple[Context, Context]:
  """(positive rows, one negative row) of contexts."""
  width = world.config.connector.out_width
  states = jnp.asarray(inputs.context(world.size, rows + 1, width), world.size.dtype)
  mask = jnp.ones(states.shape[:2], bool)
  return Context(states[:rows], mask[:rows]), Context(states[rows:], mask[rows:])


def make_generate(world: World, steps: int, guidance: float):
  """Makes the function (params, context, negative, noise) -> latents, without adapters."""

  def generate(params, context, negative, noise):
    model = world.networks.uae(params, adapters=False)
    velocity = velocity_field(model, context, guidance=guidance, negative=negative)
    return sample_ode(velocity, noise, num_steps=steps, shift=SHIFT)

  return generate


def cases(world: World) -> dict:
  size = world.size

  def guided(side):
    generate = make_generate(world, size.sampling_steps, size.guidance)
    noise = jnp.asarray(inputs.noise(size, side, size.sampling_batch))
    arguments = (world.params, *contexts(world, size.sampling_batch), noise)
    compiled, fields = compile_ahead(generate, arguments)

    def run():
      return jax.block_until_ready(compiled(*arguments))

    return Case(
      run=run,
      unit="images",
      amount=size.sampling_batch,
      flops=matrix_flops(generate, *arguments),
      check=lambda: np.asarray(run()).ravel()[::97].tolist(),
      **fields,
    )

  return {case_name(size, side): lambda side=side: guided(side) for side in size.sampling_px}
