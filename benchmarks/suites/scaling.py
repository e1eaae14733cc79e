"""Scaling of time and memory with caption length, resolution and depth, and of compile time with depth.

`growth.exponent` fits a power law to the cases of an axis. Group size is an axis of the suite `prefix`.
"""

import jax
import jax.numpy as jnp

from benchmarks import inputs
from benchmarks import world as worlds
from benchmarks.suites.ahead import compile_ahead
from benchmarks.suites.rollout import sampler
from benchmarks.suites.sampling import contexts
from benchmarks.timing import Case
from benchmarks.world import World


def cases(world: World) -> dict:
  size = world.size
  length = size.caption_tokens

  def case(function, arguments, unit, amount, axis, x):
    compiled, fields = compile_ahead(function, arguments)
    return Case(
      run=lambda: jax.block_until_ready(compiled(*arguments)),
      unit=unit,
      amount=amount,
      seconds_compile=fields["seconds_compile"],
      facts=fields["facts"] | {"axis": axis, "x": x},
    )

  def rollout(length):
    images = jnp.asarray(inputs.images(size, size.caption_px, 1))
    arguments = (world.params, images, jax.random.key(0), jnp.float32(1.0))
    return case(
      sampler(world, size.rollouts, length), arguments, "captions", size.rollouts, "caption length, rollout", length
    )

  def velocity(world, params, side, axis, x):
    context, _ = contexts(world, 1)
    noise = jnp.asarray(inputs.noise(size, side, 1))

    def apply(params, states, noise):
      return world.networks.uae(params).velocity(noise, jnp.float32(0.5), states, None)

    return case(apply, (params, context.states, noise), "images", 1, axis, x)

  def wide(side):
    return velocity(world, world.params, side, "pixels a side, one call of the decoder", side)

  def deep(depth):
    other = worlds.make(size, decoder_depth=depth)
    params = world.params | other.draw(lambda path: path.startswith("decoder/"))
    return velocity(other, params, size.image_px, "depth, one call of the decoder", depth)

  lengths = (length // 2, length, 2 * length)
  side = size.sampling_px[0]
  sides = (side // 2, side, side * 2)
  return {
    **{f"caption {n}": lambda n=n: rollout(n) for n in lengths},
    **{f"{side} px": lambda side=side: wide(side) for side in sides},
    **{f"decoder depth {depth}": lambda depth=depth: deep(depth) for depth in (2, 4, 8, 16)},
  }
