"""Jitted functions that know their work: XLA's own count takes the body of a loop once."""

from collections.abc import Callable, Iterator, Sequence
import math

import jax
from jax.extend import core


class Program:
  """`jax.jit(function)` with the matrix FLOPs of one call, counted from its trace at the first call.

  Args:
    function: of arrays.
    while_trips: how often a `while_loop` runs, which a trace does not tell: an upper bound.
    options: of `jax.jit`.
  """

  def __init__(self, function: Callable, *, while_trips: int = 1, **options):
    self._jitted = jax.jit(function, **options)
    self._while_trips = while_trips
    self._flops: float | None = None

  @property
  def flops(self) -> float:
    """Of a call, on all devices together; 0 before the first."""
    return self._flops or 0.0

  def __call__(self, *args):
    if self._flops is None:
      # The trace is kept: the call below does not trace again.
      self._flops = matrix_flops(self._jitted.trace(*args).jaxpr.jaxpr, self._while_trips)
    return self._jitted(*args)


class Composed:
  """A host function that calls each of some programs once, with their work."""

  def __init__(self, function: Callable, programs: Sequence[Program]):
    self._function, self._programs = function, programs

  @property
  def flops(self) -> float:
    return sum(program.flops for program in self._programs)

  def __call__(self, *args):
    return self._function(*args)


def matrix_flops(jaxpr: core.Jaxpr, while_trips: int = 1) -> float:
  """Multiplications and additions of all matrix products and convolutions, on all devices together.

  What is computed again under rematerialisation counts again; of the branches of a condition the largest counts.
  """
  total = 0.0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      shape = equation.invars[0].aval.shape
      total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
    elif name == "conv_general_dilated":
      kernel = equation.invars[1].aval.shape
      per_point = 2.0 * math.prod(kernel) / kernel[params["dimension_numbers"].rhs_spec[0]]
      # A dilated input is mostly zeros that nothing needs to multiply.
      total += math.prod(equation.outvars[0].aval.shape) * per_point / math.prod(params["lhs_dilation"])
    elif name == "cond":
      total += max(matrix_flops(branch.jaxpr, while_trips) for branch in params["branches"])
    else:
      total += _repeats(name, params, while_trips) * sum(matrix_flops(inner, while_trips) for inner in _inner(params))
  return total


def _repeats(name: str, params: dict, while_trips: int) -> int:
  """How often an equation runs what it carries."""
  if name == "scan":
    return params["length"]
  if name == "while":
    return while_trips
  if name == "shard_map":  # Its body is what one device does.
    return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
  if name == "pallas_call":
    return math.prod(params["grid_mapping"].grid)
  return 1


def _inner(params: dict) -> Iterator[core.Jaxpr]:
  for value in params.values():
    if isinstance(value, core.ClosedJaxpr):
      yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
      yield value
