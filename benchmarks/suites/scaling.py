"""How time grows with group size, caption length, resolution and depth; and compile time with depth.

`table.exponents` fits t ~ x ** exponent to the cases of an axis.
"""

import jax
import jax.numpy as jnp

from benchmarks import inputs
from benchmarks import world as worlds
from benchmarks.suites.rollout import sampler
from benchmarks.suites.sampling import contexts
from benchmarks.timing import Case
from benchmarks.world import World


def cases(world: World) -> dict:
  size = world.size
  length = size.caption_tokens

  def rollout(group, length, axis, x):
    sample = jax.jit(sampler(world, group, length))
    arguments = (world.params, jnp.asarray(inputs.images(size, size.caption_px, 1)), jax.random.key(0), 1.0)
    return Case(
      run=lambda: jax.block_until_ready(sample(*arguments)),
      unit="captions",
      amount=group,
      facts={"axis": axis, "x": x},
    )

  def velocity(world, side, axis, x):
    context, _ = contexts(world, 1)
    noise = jnp.asarray(inputs.noise(size, side, 1))

    @jax.jit
    def apply(params, states, noise):
      return world.networks.uae(params).velocity(noise, jnp.float32(0.5), states, None)

    return Case(
      run=lambda: jax.block_until_ready(apply(world.params, context.states, noise)),
      unit="images",
      amount=1,
      facts={"axis": axis, "x": x},
    )

  def deep(depth):
    return velocity(worlds.make(size, decoder_depth=depth), size.image_px, "depth", depth)

  groups, lengths = (4, 8, 16, 32), (length // 2, length, 2 * length, 4 * length)
  sides = (size.sampling_px // 2, size.sampling_px, size.sampling_px * 2)
  return {
    **{f"group {g}": lambda g=g: rollout(g, length // 2, "group size", g) for g in groups},
    **{f"caption {n}": lambda n=n: rollout(size.rollouts, n, "caption length", n) for n in lengths},
    **{f"{side} px": lambda side=side: velocity(world, side, "resolution (pixels a side)", side) for side in sides},
    **{f"decoder depth {depth}": lambda depth=depth: deep(depth) for depth in (3, 6, 12, 24)},
  }
