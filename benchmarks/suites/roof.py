"""Rates that the hardware reaches with XLA: a plain matrix product, plain reads and copies of memory, attention."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.sizes import ROOF_ROWS, roof_attention, roof_widths
from benchmarks.timing import Case
from benchmarks.world import World
from uae_jax.layers import attention

NEEDS = ("none",)


def cases(world: World) -> dict:
  side, wide = roof_widths(world.size)
  dtype = jnp.dtype(world.size.dtype)

  def random(*shape):
    """Random values: some processors multiply zeros and ones faster."""
    return jnp.asarray(np.resize(np.random.default_rng(0).standard_normal(2**20 + 7, np.float32), shape), dtype)

  def case(function, arguments, flops, byte_count):
    compiled = jax.jit(function)
    return Case(
      run=lambda: jax.block_until_ready(compiled(*arguments)), unit="runs", amount=1, flops=flops, bytes=byte_count
    )

  def product(rows, side):
    arguments = random(rows, side), random(side, side)
    return case(lambda a, b: a @ b, arguments, 2.0 * rows * side**2, float(side**2 * dtype.itemsize))

  def copy():
    return case(lambda a: a + 1, (random(wide, wide),), None, 2.0 * wide**2 * dtype.itemsize)

  def attend():
    q, k, v = (random(*roof_attention(world.size)) for _ in range(3))
    batch, tokens, heads, width = q.shape
    found = case(attention.attend, (q, k, v), 4.0 * batch * heads * tokens**2 * width, None)
    found.facts["attention"] = attention.choose_backend(q, k, None)
    return found

  return {
    "matrix product": lambda: product(side, side),
    "matrix reading": lambda: product(ROOF_ROWS, wide),
    "memory copy": copy,
    "attention": attend,
  }
