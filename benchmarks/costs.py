"""Work of a program, counted from its trace."""

from collections.abc import Callable

import jax

from uae_jax.training import flops


def matrix_flops(function: Callable, *args, while_trips: int = 1) -> float:
  """Multiplications and additions of all matrix products and convolutions of `function(*args)`, which is not run."""
  return flops.matrix_flops(jax.make_jaxpr(function)(*args).jaxpr, while_trips)
