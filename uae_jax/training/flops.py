"""Jitted functions that count their matrix FLOPs; XLA's own cost analysis counts the body of a loop only once."""

from collections.abc import Callable, Iterator, Sequence
import math

import jax
from jax.extend import core
import numpy as np


class Program:
  """A jitted function that counts the matrix FLOPs of a call from the trace of the first call with these shapes.

  Args:
    function: function of arrays to jit.
    trips: see `matrix_flops`.
    **options: passed to `jax.jit`.
  """

  def __init__(self, function: Callable, *, trips: Sequence[float] = (), **options):
    self._jitted = jax.jit(function, **options)
    self._trips = tuple(trips)
    self._flops_of: dict[tuple, float] = {}
    self._flops = 0.0

  @property
  def flops(self) -> float:
    """Matrix FLOPs of the last call, on all devices together; 0 before the first call."""
    return self._flops

  def __call__(self, *args):
    # Buckets have images of several shapes, each with a program of its own.
    shapes = tuple(np.shape(leaf) for leaf in jax.tree.leaves(args))
    if shapes not in self._flops_of:
      # The trace is cached: the call below does not trace again.
      self._flops_of[shapes] = matrix_flops(self._jitted.trace(*args).jaxpr.jaxpr, iter(self._trips))
    self._flops = self._flops_of[shapes]
    return self._jitted(*args)


class Composed:
  """A host function that calls each of `programs` once, or as often as it is named; its FLOPs are their sum."""

  def __init__(self, function: Callable, programs: Sequence[Program]):
    self._function, self._programs = function, programs

  @property
  def flops(self) -> float:
    return sum(program.flops for program in self._programs)

  def __call__(self, *args):
    return self._function(*args)


def matrix_flops(jaxpr: core.Jaxpr, trips: Iterator[float] | None = None) -> float:
  """Counts multiplications and additions of all matrix products and convolutions, on all devices together.

  Rematerialized computations count every time they run. Of the branches of a `cond`, the most expensive one counts.
  A decode loop counts with its longest length.

  Args:
    jaxpr: the trace.
    trips: trip counts of the while loops whose bound is not in the trace, in program order; 1 once exhausted.
  """
  trips = iter(()) if trips is None else trips
  return sum(equation_flops(equation, trips) for equation in jaxpr.eqns)


def equation_flops(equation: core.JaxprEqn, trips: Iterator[float] | None = None) -> float:
  """Counts the multiplications and additions of one equation and of the jaxprs in its parameters."""
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    shape = _shape(equation.invars[0])
    return 2.0 * math.prod(_shape(equation.outvars[0])) * math.prod(shape[axis] for axis in contracted)
  if name == "conv_general_dilated":
    kernel = _shape(equation.invars[1])
    per_point = 2.0 * math.prod(kernel) / kernel[params["dimension_numbers"].rhs_spec[0]]
    # A dilated input is mostly zeros that nothing needs to multiply.
    return math.prod(_shape(equation.outvars[0])) * per_point / math.prod(params["lhs_dilation"])
  if name == "cond":
    return max(matrix_flops(branch.jaxpr, trips) for branch in params["branches"])
  return _repeats(name, params, trips) * sum(matrix_flops(inner, trips) for inner in inner_jaxprs(params))


def _shape(value: core.Var | core.Literal) -> tuple[int, ...]:
  """Returns the shape of an operand or a result."""
  if not isinstance(value.aval, jax.core.ShapedArray):
    raise TypeError(f"{value} has no shape: expected an array, found {value.aval}")
  return value.aval.shape


def _repeats(name: str, params: dict, trips: Iterator[float] | None) -> float:
  """Returns how often an equation runs the jaxprs in its parameters."""
  if name == "scan":
    return params["length"]
  if name == "while":
    return loop_bound(params["cond_jaxpr"].jaxpr) or next(trips or iter(()), 1.0)
  if name == "shard_map":  # Its body is the program of one device.
    return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
  if name == "pallas_call":
    return math.prod(params["grid_mapping"].grid)
  return 1


def loop_bound(condition: core.Jaxpr) -> int | None:
  """N if the loop condition contains `counter < N` with a literal N, else None."""
  for equation in condition.eqns:
    if equation.primitive.name == "lt" and isinstance(equation.invars[1], core.Literal):
      return int(equation.invars[1].val)
  return None


def inner_jaxprs(params: dict) -> Iterator[core.Jaxpr]:
  """Yields the jaxprs among the parameters of an equation."""
  for value in params.values():
    if isinstance(value, core.ClosedJaxpr):
      yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
      yield value
