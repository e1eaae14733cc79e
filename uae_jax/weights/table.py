"""The weight-table engine: one table a model serves import (`load`) and export (`dump`).

A table is a tuple of rows `theirs -> ours` with a move that knows its inverse. `{layer}` (a running index) in `theirs`
stacks to the leading axis where `ours` has no `{layer}`, else it names one leaf a layer. `stream` is `load` for what
does not fit the host twice. All problems are collected into one report.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from uae_jax import trees
from uae_jax.weights.tensor_files import spec_of


@dataclasses.dataclass(frozen=True)
class Same:
  """The array as it is."""

  def apply(self, x):
    return x

  def invert(self, x):
    return x


@dataclasses.dataclass(frozen=True)
class Permute:
  """Axes reordered as in `np.transpose`: a torch weight [out, in] is `Permute((1, 0))` of our kernel [in, out]."""

  axes: tuple[int, ...]

  def apply(self, x):
    return np.transpose(x, self.axes)

  def invert(self, x):
    return np.transpose(x, tuple(np.argsort(self.axes)))


@dataclasses.dataclass(frozen=True)
class Reshape:
  """`theirs` shape to `ours` shape, same elements in the same order."""

  theirs: tuple[int, ...]
  ours: tuple[int, ...]

  def apply(self, x):
    if x.shape != self.theirs:
      raise ValueError(f"shape {x.shape}, expected {self.theirs}")
    return x.reshape(self.ours)

  def invert(self, x):
    return x.reshape(self.theirs)


@dataclasses.dataclass(frozen=True)
class Then:
  """Moves one after the other."""

  moves: tuple

  def apply(self, x):
    for move in self.moves:
      x = move.apply(x)
    return x

  def invert(self, x):
    for move in reversed(self.moves):
      x = move.invert(x)
    return x


TRANSPOSE = Permute((1, 0))
CONV = Permute((2, 3, 1, 0))  # torch [out, in, kh, kw] -> [kh, kw, in, out]


@dataclasses.dataclass(frozen=True)
class Row:
  """One correspondence. `theirs` may hold `{layer}`; `ours` is a path like `layers/attention/query/kernel`.

  `first` is the first layer index the row covers and `count` how many, when it is not all of 0, 1, 2, ...
  """

  theirs: str
  ours: str
  move: object = Same()
  first: int = 0
  count: int | None = None


def linear(theirs: str, ours: str, *, bias: bool = True, **kwargs) -> tuple[Row, ...]:
  """The rows of a torch linear layer: `weight` transposed to `kernel`, and `bias`."""
  rows = (Row(f"{theirs}.weight", f"{ours}/kernel", TRANSPOSE, **kwargs),)
  return rows + ((Row(f"{theirs}.bias", f"{ours}/bias", **kwargs),) if bias else ())


def norm(theirs: str, ours: str, *, bias: bool = False, **kwargs) -> tuple[Row, ...]:
  """The rows of a torch norm: `weight` to `scale`, and `bias`."""
  rows = (Row(f"{theirs}.weight", f"{ours}/scale", **kwargs),)
  return rows + ((Row(f"{theirs}.bias", f"{ours}/bias", **kwargs),) if bias else ())


class WeightError(ValueError):
  """Every problem between a checkpoint and a model, one a line."""

  def __init__(self, source: str, problems: list[str]):
    self.problems = problems
    super().__init__(f"{source}: {len(problems)} problem(s)\n" + "\n".join(f"  {problem}" for problem in problems))


def expand(table: Iterable[Row], abstract: Mapping, adapters: bool = False) -> dict[str, tuple[list[str], Row]]:
  """Every leaf of `abstract` with the names it has in the checkpoint.

  Args:
    table: the rows of a model.
    abstract: nested dict of arrays or `ShapeDtypeStruct`s.
    adapters: rows may name leaves (of adapters) that this model does not have.

  Returns:
    path -> (names of `theirs`, one a layer for stacked leaves; the row).

  Raises:
    WeightError: a leaf without a row, or a row without a leaf.
  """
  leaves = dict(trees.items(abstract))
  covered: dict[str, tuple[list[str], Row]] = {}
  problems = []
  for row in table:
    if "{layer}" in row.ours:
      pattern = re.compile(re.escape(row.ours).replace(re.escape("{layer}"), r"(\d+)"))
      matches = [(path, match) for path in leaves if (match := pattern.fullmatch(path))]
      found = {path: [row.theirs.replace("{layer}", str(int(match[1]) + row.first))] for path, match in matches}
    elif row.ours in leaves and "{layer}" in row.theirs:
      depth = row.count or leaves[row.ours].shape[0]
      found = {row.ours: [row.theirs.replace("{layer}", str(row.first + i)) for i in range(depth)]}
    elif row.ours in leaves:
      found = {row.ours: [row.theirs]}
    else:
      found = {}
    if not found and not adapters:
      problems.append(f"table row {row.theirs} -> {row.ours}: the model has no such parameter")
    for path, names in found.items():
      if path in covered:
        problems.append(f"{path}: filled by {covered[path][1].theirs} and by {row.theirs}")
      covered[path] = (names, row)
  problems += [f"{path}: no row of the table fills it" for path in leaves if path not in covered]
  if problems:
    raise WeightError("weight table", problems)
  return covered


def is_stacked(row: Row) -> bool:
  return "{layer}" in row.theirs and "{layer}" not in row.ours


def find_problems(
  tensors: Mapping[str, np.ndarray],
  table: Iterable[Row],
  abstract: Mapping,
  *,
  ignored: Mapping[str, str] | None = None,
) -> list[str]:
  """What keeps a checkpoint from being this model: missing, unexpected, misshapen, mistyped tensors. Reads no tensor
  of a mapping that knows its shapes (`tensor_files`).
  """
  leaves = dict(trees.items(abstract))
  problems, used = [], set()
  for path, (names, row) in expand(table, abstract).items():
    want = leaves[path]
    shape = tuple(want.shape[1:] if is_stacked(row) else want.shape)
    used.update(names)
    for name in names:
      if name not in tensors:
        problems.append(f"missing {name} (for {path}, shape {tuple(want.shape)})")
        continue
      spec = spec_of(tensors, name)
      if _is_float(want.dtype) != _is_float(spec.dtype):
        problems.append(f"{name}: dtype {spec.dtype}, {path} wants {want.dtype}")
      try:
        # A view on one number: shapes are moved, no tensor is made.
        value = row.move.apply(np.broadcast_to(np.zeros((), np.int8), spec.shape))
      except ValueError as error:
        problems.append(f"{name}: {error}")
        continue
      if value.shape != shape:
        problems.append(f"{name}: shape {spec.shape} becomes {value.shape}, {path} wants {shape}")
  skip = [re.compile(pattern) for pattern in (ignored or {})]
  problems += [
    f"unexpected {name}, shape {spec_of(tensors, name).shape}"
    for name in tensors
    if name not in used and not any(pattern.search(name) for pattern in skip)
  ]
  return problems


def _is_float(dtype) -> bool:
  return jnp.issubdtype(dtype, jnp.floating)


def load(
  tensors: Mapping[str, np.ndarray],
  table: Iterable[Row],
  abstract: Mapping,
  *,
  ignored: Mapping[str, str] | None = None,
  source: str = "checkpoint",
) -> dict:
  """theirs -> ours: a nested dict of numpy arrays shaped and typed as `abstract`.

  Args:
    tensors: name -> array; read lazily, one at a time, so a mapping over open safetensors files will do.
    table: the rows of the model.
    abstract: nested dict of `ShapeDtypeStruct`s.
    ignored: regular expression -> the reason why tensors of that name are not ours to read.
    source: what to call the checkpoint in errors.

  Raises:
    WeightError: missing, unexpected or misshapen tensors, all in one report.
  """
  table = tuple(table)
  if problems := find_problems(tensors, table, abstract, ignored=ignored):
    raise WeightError(source, problems)
  leaves = dict(trees.items(abstract))
  params = {}
  for path, (names, row) in expand(table, abstract).items():
    out = np.empty(leaves[path].shape, leaves[path].dtype)
    for i, name in enumerate(names):
      slot = out[i] if is_stacked(row) else out
      slot[...] = row.move.apply(np.asarray(tensors[name]))
    params[path] = out
  return trees.from_items(params.items())


def stream(tensors: Mapping[str, np.ndarray], table: Iterable[Row], abstract: Mapping) -> dict:
  """theirs -> ours without a copy of the model on the host: each tensor is read, moved and written into its leaf.

  A leaf is allocated once, where its sharding says; the layers of a stacked leaf are written into it in place. The host
  holds one tensor at a time. Check with `find_problems` first.

  Args:
    tensors: name -> array, read lazily.
    table: the rows of the model.
    abstract: nested dict of `ShapeDtypeStruct`s with shardings.

  Returns:
    Nested dict of jax arrays.
  """
  leaves = dict(trees.items(abstract))
  params = {}
  for path, (names, row) in expand(table, abstract).items():
    want = leaves[path]
    if not is_stacked(row):
      params[path] = _place(row.move.apply(np.asarray(tensors[names[0]])), want.dtype, want.sharding)
      continue
    layer = NamedSharding(want.sharding.mesh, PartitionSpec(*want.sharding.spec[1:]))
    allocate, write = _programs(tuple(want.shape), jnp.dtype(want.dtype), want.sharding)
    out = allocate()
    for i, name in enumerate(names):
      out = write(out, _place(row.move.apply(np.asarray(tensors[name])), want.dtype, layer), i)
      # Writes are queued otherwise, each with its tensor.
      jax.block_until_ready(out)
    params[path] = out
  return trees.from_items(params.items())


@functools.cache
def _programs(shape: tuple[int, ...], dtype, sharding: NamedSharding):
  """(() -> zeros, (leaf, layer, index) -> leaf with that layer, in place), compiled once for all leaves alike."""
  allocate = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)

  def write(leaf, layer, index):
    return jax.lax.dynamic_update_index_in_dim(leaf, layer, index, 0)

  return allocate, jax.jit(write, donate_argnums=0, out_shardings=sharding)


def _place(value: np.ndarray, dtype, sharding) -> jax.Array:
  """An array on every process's devices, from the same value on every host; each device gets its slice alone."""
  # Copied, because an array on the CPU device may otherwise be a view of the buffer that is read into.
  return jax.make_array_from_callback(value.shape, sharding, lambda index: np.array(value[index], dtype, order="C"))


def dump(params: Mapping, table: Iterable[Row]) -> dict[str, np.ndarray]:
  """ours -> theirs: name -> contiguous numpy array; the exact inverse of `load`."""
  leaves = dict(trees.items(params))
  tensors = {}
  for path, (names, row) in expand(table, params).items():
    value = np.asarray(leaves[path])
    for i, name in enumerate(names):
      tensors[name] = np.ascontiguousarray(row.move.invert(value[i] if is_stacked(row) else value))
  return tensors
