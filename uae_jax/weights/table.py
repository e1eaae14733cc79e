"""The weight-table engine: one table per model serves import (`load`) and export (`dump`).

A table is a tuple of rows `theirs -> ours`, each with an invertible move. If `theirs` contains `{layer}` (the layer
index) and `ours` does not, layers are stacked on the leading axis; if both do, there is one leaf per layer. If `ours`
has several paths, the tensor fuses those leaves, such as query, key and value in one matrix. `stream` is `load` for
models too large for a second copy in host memory. All problems are collected into one report.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from uae_jax import trees
from uae_jax.weights import finite
from uae_jax.weights.moves import TRANSPOSE, Move, Same
from uae_jax.weights.tensor_files import Spec, count_indices, spec_of


@dataclasses.dataclass(frozen=True)
class Row:
  """One correspondence between the tensors of a checkpoint and the leaves of a model.

  Attributes:
    theirs: name of a tensor; may contain `{layer}`.
    ours: a path such as `layers/attention/query/kernel`, or the paths of the leaves fused in the tensor, which is split
      into one equal part per path, in that order.
    move: maps the tensor to the leaf; for a fused tensor, maps each part to its leaf.
    first: index of the first layer that the row covers.
    count: number of layers; default: the number of layers of the leaf.
    axis: axis along which a fused tensor is split.
  """

  theirs: str
  ours: str | tuple[str, ...]
  move: Move = Same()
  first: int = 0
  count: int | None = None
  axis: int = 0

  @property
  def paths(self) -> tuple[str, ...]:
    """`ours` as a tuple, even if it is a single path."""
    return (self.ours,) if isinstance(self.ours, str) else self.ours

  def inside(self, prefix: str) -> "Row":
    """The same row for a model that is the submodule `prefix` of a larger one."""
    paths = tuple(f"{prefix}/{path}" for path in self.paths)
    return dataclasses.replace(self, ours=paths[0] if isinstance(self.ours, str) else paths)


@dataclasses.dataclass(frozen=True)
class Match:
  """A row of a table, matched to the leaves of a given model.

  Attributes:
    row: the row.
    paths: paths of the leaves that it fills, one per part of the tensor.
    names: tensors of the checkpoint, one per layer for stacked leaves, otherwise a single one.
  """

  row: Row
  paths: tuple[str, ...]
  names: tuple[str, ...]

  @property
  def is_stacked(self) -> bool:
    """Whether the leaves have a leading layers axis that the tensors do not have."""
    return "{layer}" in self.row.theirs and "{layer}" not in self.row.paths[0]

  def split(self, tensor: np.ndarray) -> list[np.ndarray]:
    """Converts a tensor of the checkpoint to the values of one layer for each of `paths`.

    Raises:
      ValueError: the tensor has a shape that the move or the split does not accept.
    """
    count, axis = len(self.paths), self.row.axis
    if count == 1:
      return [self.row.move.apply(tensor)]
    if axis >= tensor.ndim or tensor.shape[axis] % count:
      raise ValueError(f"shape {tensor.shape} does not split into {count} parts along axis {axis}")
    return [self.row.move.apply(part) for part in np.split(tensor, count, axis)]

  def join(self, values: Iterable[np.ndarray]) -> np.ndarray:
    """Converts the values of one layer of `paths` to a tensor of the checkpoint; the inverse of `split`."""
    parts = [self.row.move.invert(value) for value in values]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, self.row.axis)

  def layer_shape(self, leaf) -> tuple[int, ...]:
    """Shape of one layer of a stacked leaf, or of an unstacked leaf."""
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
  """All mismatches between a checkpoint and a model; the message has one problem per line."""

  def __init__(self, source: str, problems: list[str]):
    self.problems = problems
    super().__init__(f"{source}: {len(problems)} problem(s)\n" + "\n".join(f"  {problem}" for problem in problems))


def depth_problems(table: Iterable[Row], tensors: Mapping, depth: int) -> list[str]:
  """What is wrong with the number of layers in a config, before it is expanded.

  Args:
    table: rows of a model with one stack of layers.
    tensors: the checkpoint.
    depth: number of layers in the config.
  """
  prefix = next(row.theirs for row in table if "{layer}" in row.theirs).split("{layer}")[0]
  found = count_indices(tensors, prefix)
  return [f"num_hidden_layers is {depth}, the tensors have {found} {prefix}*"] if found != depth else []


def expand(
  table: Iterable[Row], abstract: Mapping, adapters: bool = False, available: int | None = None
) -> list[Match]:
  """Matches the rows of a table to a model; every leaf of `abstract` is in exactly one match.

  Args:
    table: the rows of the model.
    abstract: nested dict of arrays or `ShapeDtypeStruct`s.
    adapters: allow rows for (adapter) leaves that this model does not have.
    available: number of tensors in the checkpoint; a stack of more layers is a problem and is not expanded.

  Raises:
    WeightError: a leaf has no row or two rows, or a row has no leaf.
  """
  leaves = dict(trees.items(abstract))
  filled_by: dict[str, Row] = {}
  matches, problems = [], []
  for row in table:
    depth = _depth(row, leaves)
    if available is not None and depth > available:
      problems.append(f"{row.theirs}: the config has {depth} layers, the checkpoint only {available} tensors")
      filled_by |= dict.fromkeys(row.paths, row)
      continue
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
  """The matches of a row: one, or one per layer if `ours` contains `{layer}`; none if a leaf is absent."""
  if "{layer}" in row.paths[0]:
    pattern = re.compile(re.escape(row.paths[0]).replace(re.escape("{layer}"), r"(\d+)"))
    indices = [int(match[1]) for path in leaves if (match := pattern.fullmatch(path))]
    found = [Match(row, tuple(_at(path, i) for path in row.paths), (_at(row.theirs, i + row.first),)) for i in indices]
  elif row.paths[0] in leaves and "{layer}" in row.theirs:
    names = tuple(_at(row.theirs, row.first + i) for i in range(_depth(row, leaves)))
    found = [Match(row, row.paths, names)]
  else:
    found = [Match(row, row.paths, (row.theirs,))]
  return [match for match in found if all(path in leaves for path in match.paths)]


def _depth(row: Row, leaves: Mapping) -> int:
  """Number of tensors of a stacked row; 1 for others."""
  is_stacked = "{layer}" in row.theirs and row.paths[0] in leaves
  return (row.count or leaves[row.paths[0]].shape[0]) if is_stacked else 1


def _at(name: str, layer: int) -> str:
  return name.replace("{layer}", str(layer))


def specs(table: Iterable[Row], abstract: Mapping) -> dict[str, Spec]:
  """Shape and dtype of every tensor that `dump` would return, without touching any values."""
  leaves = dict(trees.items(abstract))
  return {name: match_spec(match, leaves) for match in expand(table, abstract) for name in match.names}


def match_spec(match: Match, leaves: Mapping) -> Spec:
  """Shape and dtype of the tensors of a match."""
  views = [_view(match.layer_shape(leaves[path])) for path in match.paths]
  return Spec(match.join(views).shape, np.dtype(leaves[match.paths[0]].dtype))


def _view(shape: tuple[int, ...]) -> np.ndarray:
  """An array of this shape that allocates only one byte, for applying moves to shapes."""
  return np.broadcast_to(np.zeros((), np.int8), shape)


def find_problems(
  tensors: Mapping[str, np.ndarray],
  table: Iterable[Row],
  abstract: Mapping,
  *,
  ignored: Mapping[str, str] | None = None,
) -> list[str]:
  """Lists missing and unexpected tensors, and tensors of wrong shape or dtype, for a checkpoint and a model.

  Reads no tensor if the mapping knows its shapes (`tensor_files`).
  """
  leaves = dict(trees.items(abstract))
  problems: list[str] = []
  used: set[str] = set()
  try:
    matches = expand(table, abstract, available=len(tensors))
  except WeightError as error:
    return error.problems
  for match in matches:
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
  """Loads a checkpoint as a nested dict of NumPy arrays with the shapes and dtypes of `abstract`.

  Args:
    tensors: name -> array, read lazily, one at a time; may be a mapping over open safetensors files.
    table: the rows of the model.
    abstract: nested dict of `ShapeDtypeStruct`s.
    ignored: regular expression over tensor names -> reason why matching tensors are not read.
    source: name of the checkpoint in error messages.

  Raises:
    WeightError: tensors are missing, unexpected, not finite, or have the wrong shape or dtype; reports all of them.
  """
  table = tuple(table)
  if problems := find_problems(tensors, table, abstract, ignored=ignored):
    raise WeightError(source, problems)
  leaves = dict(trees.items(abstract))
  params: dict[str, np.ndarray] = {}
  for match in expand(table, abstract):
    outs = [np.empty(leaves[path].shape, leaves[path].dtype) for path in match.paths]
    for i, name in enumerate(match.names):
      for out, part in zip(outs, match.split(np.asarray(tensors[name])), strict=True):
        slot = out[i] if match.is_stacked else out
        slot[...] = part
    params |= zip(match.paths, outs, strict=True)
  refuse_non_finite(table, abstract, params, source)
  return trees.from_items((path, params[path]) for path in leaves)


def refuse_non_finite(table: Iterable[Row], abstract: Mapping, params: Mapping[str, Any], source: str) -> None:
  """Refuses leaves with NaN or infinite values, by the names of their tensors.

  Args:
    table: the rows of the model.
    abstract: its parameters.
    params: path -> leaf.
    source: name of the checkpoint in error messages.

  Raises:
    WeightError: there are such leaves.
  """
  rows, problems = finite.finite_rows(params), dict[str, None]()
  for match in expand(table, abstract):
    for path in match.paths:
      are_finite = rows[path][: len(match.names)] if match.is_stacked else [rows[path].all()]
      bad = [name for name, is_finite in zip(match.names, are_finite, strict=True) if not is_finite]
      problems |= dict.fromkeys(f"{name} {finite.WHAT}" for name in bad)
  if problems:
    raise WeightError(source, list(problems))


def stream(
  tensors: Mapping[str, np.ndarray], table: Iterable[Row], abstract: Mapping, source: str = "checkpoint"
) -> dict:
  """Loads a checkpoint directly to devices, with one tensor at a time in host memory.

  Each leaf is allocated once with its sharding; layers are written into a stacked leaf in place. Check the checkpoint
  with `find_problems` first.

  Args:
    tensors: name -> array, read lazily.
    table: the rows of the model.
    abstract: nested dict of `ShapeDtypeStruct`s with shardings.
    source: name of the checkpoint in error messages.

  Returns:
    Nested dict of JAX arrays with the shapes, dtypes and shardings of `abstract`.

  Raises:
    WeightError: tensors are not finite.
  """
  table = tuple(table)
  leaves = dict(trees.items(abstract))
  params: dict[str, jax.Array] = {}
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
        # Otherwise writes would queue up, each holding its tensor in memory.
        jax.block_until_ready(outs[j])
    params |= zip(match.paths, outs, strict=True)
  refuse_non_finite(table, abstract, params, source)
  return trees.from_items((path, params[path]) for path in leaves)


@functools.cache
def _programs(shape: tuple[int, ...], dtype, sharding: NamedSharding):
  """(() -> zeros, (leaf, layer, index) -> leaf updated in place), compiled once per shape, dtype and sharding."""
  allocate = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)

  def write(leaf, layer, index):
    return jax.lax.dynamic_update_index_in_dim(leaf, layer, index, 0)

  return allocate, jax.jit(write, donate_argnums=0, out_shardings=sharding)


def _place(value: np.ndarray, dtype, sharding) -> jax.Array:
  """A sharded array from a value that is the same on every host; each device receives only its slice."""
  # Copied, because an array on a CPU device may otherwise alias the host buffer.
  return jax.make_array_from_callback(value.shape, sharding, lambda index: np.array(value[index], dtype, order="C"))


def dump(params: Mapping, table: Iterable[Row]) -> dict[str, np.ndarray]:
  """Converts parameters to tensors, name -> contiguous NumPy array; the exact inverse of `load`."""
  leaves = dict(trees.items(params))
  tensors = {}
  for match in expand(table, params):
    values = [np.asarray(leaves[path]) for path in match.paths]
    for i, name in enumerate(match.names):
      tensors[name] = np.ascontiguousarray(match.join([x[i] if match.is_stacked else x for x in values]))
  return tensors
