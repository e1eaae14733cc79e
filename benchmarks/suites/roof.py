"""Rates that the hardware reaches with XLA in a plain matrix product and in plain memory reads."""

import jax
import jax.numpy as jnp

from benchmarks.sizes import ROOF_ROWS, roof_widths
from benchmarks.timing import Case
from benchmarks.world import World


def cases(world: World) -> dict:
  side, wide = roof_widths(world.size)
  dtype = jnp.dtype(world.size.dtype)

  def product(rows, side):
    a, b = jnp.ones((rows, side), dtype), jnp.ones((side, side), dtype)
    multiply = jax.jit(lambda a, b: a @ b)
    return Case(
      run=lambda: jax.block_until_ready(multiply(a, b)),
      unit="products",
      amount=1,
      flops=2.0 * rows * side**2,
      bytes=float(side**2 * dtype.itemsize),
    )

  return {"matrix product": lambda: product(side, side), "matrix reading": lambda: product(ROOF_ROWS, wide)}
