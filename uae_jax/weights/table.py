"""The weight-table engine: one table per model serves import (`load`) and export (`dump`).

A table is a tuple of rows `theirs -> ours` with a move that knows its inverse. `{layer}` (a running index) in `theirs`
stacks to the leading axis where `ours` has no `{layer}`, else it names one leaf per layer. Where `ours` is several
paths, the tensor is those leaves fused: query, key and value in one matrix. `stream` is `load` for a model that does
not fit in host memory twice. All problems are collected into one report.
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
from uae_jax.weights.tensor_files import Spec, spec_of


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
  """One correspondence between the tensors of a checkpoint and the leaves of a model.

  Attributes:
    theirs: name of a tensor; may hold `{layer}`.
    ours: a path like `layers/attention/query/kernel`, or the paths of the leaves that are fused in the tensor: it is
      split into one equal part per path, in that order.
    move: from the tensor to the leaf; of a fused tensor, from each part to its leaf.
    first: index of the first layer that the row covers.
    count: number of layers; by default as many as the leaf has.
    axis: of the fused tensor, along which it is split.
  """

  theirs: str
  ours: str | tuple[str, ...]
  move: object = Same()
  first: int = 0
  count: int | None = None
  axis: int = 0

  @property
  def paths(self) -> tuple[str, ...]:
    """`ours` as a tuple, also where it is one path."""
    return (self.ours,) if isinstance(self.ours, str) else self.ours

  def inside(self, prefix: str) -> "Row":
    """The same row for a model that is the part called `prefix` of a larger one."""
    paths = tuple(f"{prefix}/{path}" for path in self.paths)
    return dataclasses.replace(self, ours=paths[0] if isinstance(self.ours, str) else paths)


@dataclasses.dataclass(frozen=True)
class Match:
  """A row of a table in a given model.

  Attributes:
    row: of the table.
    paths: leaves that it fills, one per part of the tensor.
    names: tensors of the checkpoint, one per layer of the stacked leaves, or a single one.
  """

  row: Row
  paths: tuple[str, ...]
  names: tuple[str, ...]

  @property
  def is_stacked(self) -> bool:
    """Whether the leaves have a leading axis of layers that the tensors do not have."""
    return "{layer}" in self.row.theirs and "{layer}" not in self.row.paths[0]

  def split(self, tensor: np.ndarray) -> list[np.ndarray]:
    """theirs -> ours: what a tensor holds for each of `paths`, of one layer.

    Raises:
      ValueError: the tensor has a shape that the move or the split does not expect.
    """
    count, axis = len(self.paths), self.row.axis
    if count == 1:
      return [self.row.move.apply(tensor)]
    if axis >= tensor.ndim or tensor.shape[axis] % count:
      raise ValueError(f"shape {tensor.shape} does not split into {count} parts along axis {axis}")
    return [self.row.move.apply(part) for part in np.split(tensor, count, axis)]

  def join(self, values: Iterable[np.ndarray]) -> np.ndarray:
    """ours -> theirs: the tensor of one layer of `paths`; the inverse of `split`."""
    parts = [self.row.move.invert(value) for value in values]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, self.row.axis)

  def layer_shape(self, leaf) -> tuple[int, ...]:
    """Shape of one layer of a leaf, or of a leaf that is not stacked."""
    return tuple(leaf.shape[1:] if self.is_stacked else leaf.shape)


def linear(theirs: str, ours: str, *, bias: bool = True, **kwargs) -> tuple[Row, ...]:
  """The rows of a torch linear layer: `weight` transposed to `kernel`, and `bias`."""
  rows = (Row(f"{theirs}.weight", f"{ours}/kernel", TRANSPOSE, **kwargs),)
  return rows + ((Row(f"{theirs}.bias", f"{ours}/bias", **kwargs),) if bias else ())


def norm(theirs: str, ours: str, *, bias: bool = False, **kwargs) -> tuple[Row, ...]:
  """The rows of a torch norm: `weight` to `scale`, and `bias`."""
  rows = (Row(f"{theirs}.weight", f"{ours}/scale", **kwargs),)
  return rows + ((Row(f"{theirs}.bias", f"{ours}/bias", **kwargs),) if bias else ())


class WeightError(ValueError):
  """Every problem between a checkpoint and a model, one per line."""

  def __init__(self, source: str, problems: list[str]):
    self.problems = problems
    super().__init__(f"{source}: {len(problems)} problem(s)\n" + "\n".join(f"  {problem}" for problem in problems))


def expand(table: Iterable[Row], abstract: Mapping, adapters: bool = False) -> list[Match]:
  """The rows of a table in a model: every leaf of `abstract` is in one match.

  Args:
    table: the rows of a model.
    abstract: nested dict of arrays or `ShapeDtypeStruct`s.
    adapters: rows may name leaves (of adapters) that this model does not have.

  Raises:
    WeightError: a leaf without a row, a row without a leaf, or a leaf with two rows.
  """
  leaves = dict(trees.items(abstract))
  filled_by: dict[str, Row] = {}
  matches, problems = [], []
  for row in table:
    found = _matches(row, leaves)
    if not found and not adapters:
      absent = [path for path in row.paths if path not in leaves]
      problems.append(f"table row {row.theirs} -> {', '.join(absent)}: the model has no such parameter")
    for match in found:
      for path in match.paths:
        if path in filled_by:
          problems.append(f"{path}: filled by {filled_by[path].theirs} and by {row.theirs}")
        filled_by[path] = row
    matches += found
  problems += [f"{path}: no row of the table fills it" for path in leaves if path not in filled_by]
  if problems:
    raise WeightError("weight table", problems)
  return matches


def _matches(row: Row, leaves: Mapping) -> list[Match]:
  """One match, or one per layer where `ours` holds `{layer}`; none where a leaf is absent."""
  if "{layer}" in row.paths[0]:
    pattern = re.compile(re.escape(row.paths[0]).replace(re.escape("{layer}"), r"(\d+)"))
    indices = [int(match[1]) for path in leaves if (match := pattern.fullmatch(path))]
    found = [Match(row, tuple(_at(path, i) for path in row.paths), (_at(row.theirs, i + row.first),)) for i in indices]
  elif row.paths[0] in leaves and "{layer}" in row.theirs:
    depth = row.count or leaves[row.paths[0]].shape[0]
    found = [Match(row, row.paths, tuple(_at(row.theirs, row.first + i) for i in range(depth)))]
  else:
    found = [Match(row, row.paths, (row.theirs,))]
  return [match for match in found if all(path in leaves for path in match.paths)]


def _at(name: str, layer: int) -> str:
  return name.replace("{layer}", str(layer))


def specs(table: Iterable[Row], abstract: Mapping) -> dict[str, Spec]:
  """Shape and dtype of every tensor that `dump` would write, without moving any numbers."""
  leaves = dict(trees.items(abstract))
  return {name: match_spec(match, leaves) for match in expand(table, abstract) for name in match.names}


def match_spec(match: Match, leaves: Mapping) -> Spec:
  """Of each tensor of a match."""
  views = [_view(match.layer_shape(leaves[path])) for path in match.paths]
  return Spec(match.join(views).shape, np.dtype(leaves[match.paths[0]].dtype))


def _view(shape: tuple[int, ...]) -> np.ndarray:
  """A view of one byte: shapes are moved, no tensor is allocated."""
  return np.broadcast_to(np.zeros((), np.int8), shape)


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
  for match in expand(table, abstract):
    used.update(match.names)
    for name in match.names:
      if name not in tensors:
        wanted = ", ".join(f"{path}, shape {tuple(leaves[path].shape)}" for path in match.paths)
        problems.append(f"missing {name} (for {wanted})")
        continue
      spec = spec_of(tensors, name)
      mistyped = [path for path in match.paths if _is_float(leaves[path].dtype) != _is_float(spec.dtype)]
      problems += [f"{name}: dtype {spec.dtype}, {path} wants {leaves[path].dtype}" for path in mistyped]
      try:
        parts = match.split(_view(spec.shape))
      except ValueError as error:
        problems.append(f"{name}: {error}")
        continue
      for path, part in zip(match.paths, parts, strict=True):
        shape = match.layer_shape(leaves[path])
        if part.shape != shape:
          problems.append(f"{name}: shape {spec.shape} becomes {part.shape}, {path} wants {shape}")
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
  for match in expand(table, abstract):
    outs = [np.empty(leaves[path].shape, leaves[path].dtype) for path in match.paths]
    for i, name in enumerate(match.names):
      for out, part in zip(outs, match.split(np.asarray(tensors[name])), strict=True):
        slot = out[i] if match.is_stacked else out
        slot[...] = part
    params |= zip(match.paths, outs, strict=True)
  return trees.from_items((path, params[path]) for path in leaves)


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
  for match in expand(table, abstract):
    wants = [leaves[path] for path in match.paths]
    if not match.is_stacked:
      parts = match.split(np.asarray(tensors[match.names[0]]))
      placed = [_place(part, want.dtype, want.sharding) for part, want in zip(parts, wants, strict=True)]
      params |= zip(match.paths, placed, strict=True)
      continue
    programs = [_programs(tuple(want.shape), jnp.dtype(want.dtype), want.sharding) for want in wants]
    outs = [allocate() for allocate, _ in programs]
    for i, name in enumerate(match.names):
      for j, part in enumerate(match.split(np.asarray(tensors[name]))):
        layer = NamedSharding(wants[j].sharding.mesh, PartitionSpec(*wants[j].sharding.spec[1:]))
        outs[j] = programs[j][1](outs[j], _place(part, wants[j].dtype, layer), i)
        # Writes are queued otherwise, each with its tensor.
        jax.block_until_ready(outs[j])
    params |= zip(match.paths, outs, strict=True)
  return trees.from_items((path, params[path]) for path in leaves)


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
  for match in expand(table, params):
    values = [np.asarray(leaves[path]) for path in match.paths]
    for i, name in enumerate(match.names):
      tensors[name] = np.ascontiguousarray(match.join([x[i] if match.is_stacked else x for x in values]))
  return tensors
