"""Work of a program from its trace: matrix products, times the loop trip counts that XLA's cost analysis ignores.

A product takes the longer of two times: its FLOPs at the chip's peak, and the bytes of its operands and result at the
memory bandwidth. Everything between products is assumed to be fused and free, so the sum is a lower bound of the time.
Products of int8 with int8 have a peak of their own, and a weight that is converted from int8 is read as int8.

A trace describes all devices together. Values that depend on the batch are sharded over all devices. A weight is
all-gathered over `fsdp` where it is used (`sharding.gather`) and stays sharded over `tensor` only.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import math
import operator

import jax
from jax.extend import core
import jax.numpy as jnp

from uae_jax.planning.chips import Chip
from uae_jax.training.flops import equation_flops, inner_jaxprs, loop_bound, matrix_flops


@dataclasses.dataclass(frozen=True)
class Work:
  """Work of one device: FLOPs, bytes moved to and from HBM, seconds at the chip's peaks, and those of FLOPs alone."""

  flops: float = 0.0
  bytes: float = 0.0
  seconds: float = 0.0
  flop_seconds: float = 0.0

  def __add__(self, other: "Work") -> "Work":
    return Work(*map(operator.add, dataclasses.astuple(self), dataclasses.astuple(other)))

  def __mul__(self, times: float) -> "Work":
    return Work(*(times * value for value in dataclasses.astuple(self)))


@dataclasses.dataclass
class Counter:
  """Counts the work of one program.

  Attributes:
    chip: supplies the peak rates.
    num_rows: number of batch shards, `data` * `fsdp`.
    num_columns: number of weight shards, `tensor`.
    int8: results of conversions from int8, which are fused with the products that read them.
    trips: trip counts of the while loops whose bound is not in the trace, in program order; 1 once exhausted.
  """

  chip: Chip
  num_rows: int
  num_columns: int
  trips: Iterator[float]
  int8: set[core.Var] = dataclasses.field(default_factory=set)

  def count(self, jaxpr: core.Jaxpr, is_batch: Sequence[bool]) -> tuple[Work, list[bool]]:
    """(work, for each result whether it depends on the batch), given the same flag for each argument."""
    known = dict(zip(jaxpr.invars, is_batch, strict=True))
    total = Work()
    for equation in jaxpr.eqns:
      inputs = [known.get(x, False) if isinstance(x, core.Var) else False for x in equation.invars]
      source = equation.invars[0] if equation.primitive.name in ("convert_element_type", "transpose") else None
      if isinstance(source, core.Var) and (source in self.int8 or is_int8(source)):
        self.int8.update(equation.outvars)
      work, outputs = self._equation(equation, inputs)
      total = total + work
      known.update(zip(equation.outvars, outputs, strict=True))
    return total, [known.get(x, False) if isinstance(x, core.Var) else False for x in jaxpr.outvars]

  def _equation(self, equation, inputs: list[bool]) -> tuple[Work, list[bool]]:
    name, params = equation.primitive.name, equation.params
    everywhere = [any(inputs)] * len(equation.outvars)
    if name in ("dot_general", "conv_general_dilated"):
      return self._product(equation, inputs, equation_flops(equation)), everywhere
    if name == "pallas_call":
      flops = math.prod(params["grid_mapping"].grid) * matrix_flops(params["jaxpr"])
      return self._product(equation, inputs, flops), everywhere
    if name == "scan":
      num_constants, num_carry = params["num_consts"], params["num_carry"]
      return self._loop(params["jaxpr"].jaxpr, inputs, num_constants, num_carry, params["length"])
    if name == "while":
      num_conditions = params["cond_nconsts"]
      trips = loop_bound(params["cond_jaxpr"].jaxpr) or next(self.trips, 1.0)
      num_constants = params["body_nconsts"]
      num_carry = len(inputs) - num_conditions - num_constants
      return self._loop(params["body_jaxpr"].jaxpr, inputs[num_conditions:], num_constants, num_carry, trips)
    if name == "cond":
      branches = [self.count(branch.jaxpr, inputs[1:]) for branch in params["branches"]]
      work = max((work for work, _ in branches), key=lambda work: work.seconds)
      return work, [any(flags) for flags in zip(*(outputs for _, outputs in branches), strict=True)]
    inner = next((x for x in inner_jaxprs(params) if len(x.invars) == len(inputs)), None)
    if inner is None:
      return Work(), everywhere
    if name == "shard_map":
      # Shapes inside are per device.
      return dataclasses.replace(self, num_rows=1, num_columns=1).count(inner, inputs)
    return self.count(inner, inputs)

  def _loop(self, body: core.Jaxpr, inputs: list[bool], num_constants: int, num_carry: int, trips: float):
    """Cost of a loop body times its trip count; batch dependence propagates through the carry to a fixed point."""
    inputs = list(inputs)
    trips_left = list(self.trips)
    while True:
      self.trips = iter(trips_left)
      work, outputs = self.count(body, inputs)
      carry = slice(num_constants, num_constants + num_carry)
      grown = [a or b for a, b in zip(inputs[carry], outputs[:num_carry], strict=True)]
      if grown == inputs[carry]:
        return work * trips, outputs
      inputs[carry] = grown

  def _product(self, equation, inputs: list[bool], flops: float) -> Work:
    columns = self.num_columns
    share = self.num_rows * columns
    moved = sum(
      (math.prod(x.aval.shape) if x in self.int8 else size(x)) / (share if is_batch else columns)
      for x, is_batch in zip(equation.invars, inputs, strict=True)
    )
    moved += sum(size(x) for x in equation.outvars) / (share if any(inputs) else columns)
    flops = flops / (share if any(inputs) else columns)
    peak = self.chip.flops
    if all(is_int8(x) for x in equation.invars):
      peak = self.chip.int8_flops or peak
    return Work(flops, moved, max(flops / peak, moved / self.chip.hbm_bandwidth), flops / peak)


def is_int8(variable) -> bool:
  return getattr(variable.aval, "dtype", None) == jnp.int8


def size(variable) -> float:
  """Bytes of an array in the trace; a Pallas reference counts as the array it points to."""
  aval = variable.aval
  return math.prod(aval.shape) * aval.dtype.itemsize if hasattr(aval, "dtype") else 0.0


def count(
  traced: jax.stages.Traced, is_batch: Sequence[bool], chip: Chip, mesh: jax.sharding.Mesh, trips: Sequence[float] = ()
) -> Work:
  """Counts the work of one device in a traced function.

  Args:
    traced: result of `jax.jit(...).trace(...)`.
    is_batch: for each leaf of the arguments, whether it depends on the batch.
    chip: supplies the peak rates.
    mesh: has the axes data, fsdp and tensor.
    trips: see `Counter`.
  """
  counter = Counter(chip, mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"], iter(trips))
  return counter.count(traced.jaxpr.jaxpr, is_batch)[0]
