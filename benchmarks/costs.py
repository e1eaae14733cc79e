"""FLOPs of a program, counted from its trace."""

from collections.abc import Callable

import jax

from uae_jax.training import flops


def matrix_flops(function: Callable, *args) -> float:
  """FLOPs of all matrix products and convolutions in `function(*args)`, which is traced but not run."""
  return flops.matrix_flops(jax.make_jaxpr(function)(*args).jaxpr)
