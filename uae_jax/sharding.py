"""The mesh, the table of logical axis rules, and abstract models with the sharding of every leaf.

Weights are annotated with logical axis names (`("embed", "mlp")`) where they are created; activations are constrained
with `constrain`. A run chooses only the mesh shape `(data, fsdp, tensor)`; an axis of size 1 disables its rules.

Weights are stored sharded over `fsdp`; `gather` all-gathers them where they are used, one layer at a time.
"""

from collections.abc import Callable, Sequence
import functools
import math
import os
from typing import TypeVar

from flax import nnx
import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

Model = TypeVar("Model", bound=nnx.Module)

MESH_AXES = ("data", "fsdp", "tensor")
# On v5p slices of 64 chips XLA turns all-gathers over an axis of 64 into all-reduces, with twice the traffic (seen in
# compiled programs; up to 32 they stay all-gathers on every slice tried). Use `data` for further devices.
MAX_FSDP = 32

RULES = {
  # Activations.
  "batch": ("data", "fsdp"),
  "act_tokens": None,
  "act_embed": None,
  "act_heads": "tensor",
  "act_mlp": "tensor",
  # Weights.
  "layers": None,
  "embed": "fsdp",
  "heads": "tensor",
  # Qwen2.5-VL-3B has two key/value heads, which a tensor axis larger than 2 does not divide.
  "kv_heads": None,
  "mlp": "tensor",
  "vocab": "tensor",
  "lora": None,
  # The long axis of an adapter factor is always sharded over fsdp, even if the kernel's axis is not.
  "adapter": "fsdp",
  "adapter_tensor": ("fsdp", "tensor"),
  "patch": None,
  "conv_in": None,
  "conv_out": None,
}


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
  """Makes a mesh with Auto axes (`jax.make_mesh` alone makes Explicit ones).

  Devices of several slices form a hybrid mesh: `data` spans the network between slices, `fsdp` and `tensor` stay on the
  links within a slice.

  Raises:
    ValueError: the axes do not fit the devices or their slices, `fsdp` exceeds `MAX_FSDP`, or some slices are missing.
  """
  num_expected = int(os.environ.get("MEGASCALE_NUM_SLICES") or 1) if devices is None else None
  devices = jax.devices() if devices is None else devices
  shape = (data, fsdp, tensor)
  text = f"mesh (data={data}, fsdp={fsdp}, tensor={tensor})"
  if min(shape) < 1 or np.prod(shape) != len(devices):
    raise ValueError(f"{text} needs {np.prod(shape)} devices, found {len(devices)}: change config.mesh")
  if fsdp > MAX_FSDP:
    raise ValueError(
      f"{text}: fsdp may be at most {MAX_FSDP}, beyond it gathers become all-reduces: "
      f"set config.mesh.fsdp={MAX_FSDP} and config.mesh.data={data * fsdp // MAX_FSDP}"
    )
  # CPUs do not know their slice: their processes are divided in order, slice after slice.
  is_cpu = getattr(devices[0], "platform", "") == "cpu"
  num_slices = (num_expected or 1) if is_cpu else len({getattr(device, "slice_index", 0) for device in devices})
  if num_expected not in (None, 1, num_slices):
    raise ValueError(
      f"MEGASCALE_NUM_SLICES = {num_expected}, but the devices are of {num_slices} slices: not all slices have joined"
    )
  if data % num_slices:
    raise ValueError(
      f"{text}: data = {data} does not divide by {num_slices} slices, and only data goes over the network "
      "between them: change config.mesh.data"
    )
  if num_slices == 1 or is_cpu:
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
  inside = (data // num_slices, fsdp, tensor)
  array = mesh_utils.create_hybrid_device_mesh(inside, (num_slices, 1, 1), devices)
  return Mesh(array, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Constrains the sharding of an activation by logical axis names; the identity without a mesh or on one device."""
  return _pin(x, _cut(axes)) if jax.sharding.get_abstract_mesh().size > 1 else x


def gather(weight: jax.Array, *axes: str | None) -> jax.Array:
  """All-gathers a weight over `fsdp`; it stays sharded over `tensor`. The identity if `fsdp` has size 1.

  Its gradient is sharded like the weight, by a reduce-scatter, so at most one layer of the gradient is unsharded at a
  time.

  Args:
    weight: a weight, stacked or of one layer.
    axes: logical axis name per dimension.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return weight if mesh.shape.get("fsdp", 1) == 1 else _gather(weight, axes)


def axes_of(array: jax.Array, axes: Sequence[str | None]) -> tuple[str | None, ...]:
  """The axis names of an array that has length 1 where it broadcasts against the array of these axes."""
  return tuple(None if length == 1 else axis for length, axis in zip(array.shape, axes, strict=True))


def mesh_axes(rule: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """The mesh axes of a rule or of an entry of a `PartitionSpec`."""
  return (rule,) if isinstance(rule, str) else tuple(rule or ())


def _pin(x: jax.Array, rules) -> jax.Array:
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*rules))


def _cut(axes: tuple[str | None, ...]):
  return (None if axis is None else RULES[axis] for axis in axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(weight: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
  return _pin(weight, (tuple(axis for axis in mesh_axes(rule) if axis != "fsdp") or None for rule in _cut(axes)))


_gather.defvjp(
  lambda weight, axes: (_gather(weight, axes), None),
  lambda axes, _, gradient: (_pin(gradient, _cut(axes)),),
)


def gathered(module: Model) -> Model:
  """The module with all weights all-gathered over `fsdp`, including stacked layers.

  For loops that use every weight many times: decoding would otherwise all-gather the whole model for every token.
  """

  def whole(variable: nnx.Variable) -> nnx.Variable:
    value = variable.get_value()
    axes = variable.get_metadata("out_sharding", (None,) * value.ndim)
    # Several arrays if the weight is quantized; its scale is not cut along its axis of length 1.
    return variable.replace(jax.tree.map(lambda leaf: gather(leaf, *axes_of(leaf, axes)), value))

  graphdef, state = nnx.split(module)
  return nnx.merge(graphdef, jax.tree.map(whole, state, is_leaf=lambda x: isinstance(x, nnx.Variable)))


def abstract_model(build: Callable[[], nnx.Module], mesh: Mesh):
  """(graphdef, nested dict of `ShapeDtypeStruct`s with shardings) of `build()`; allocates no arrays."""
  with nnx.use_eager_sharding(False), nnx.logical_axis_rules(tuple(RULES.items())):
    graphdef, state = nnx.get_abstract_model(build, mesh)
  params = nnx.to_pure_dict(state)
  check_divisible(params, mesh)
  return graphdef, params


def check_divisible(tree: dict, mesh: Mesh) -> None:
  """Raises `ValueError`, naming the array and the setting, if the rules shard a dimension unevenly."""
  for path, leaf in jax.tree.leaves_with_path(tree):
    for size, rule in zip(leaf.shape, leaf.sharding.spec, strict=False):
      axes = mesh_axes(rule)
      parts = math.prod(mesh.shape[axis] for axis in axes)
      if size % parts:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        raise ValueError(
          f"{name} {leaf.shape}: {size} does not divide by {' * '.join(axes)} = {parts}: "
          f"change {' or '.join(f'config.mesh.{axis}' for axis in axes)}"
        )


def check_heads(name: str, num_heads: int, mesh: Mesh) -> None:
  """Raises `ValueError` if the attention heads do not divide over `tensor`."""
  if num_heads % mesh.shape["tensor"]:
    raise ValueError(
      f"{name} has {num_heads} heads, which do not divide by tensor = {mesh.shape['tensor']}: change config.mesh.tensor"
    )


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Sharding of the leading axis over `data` and `fsdp`."""
  return NamedSharding(mesh, PartitionSpec(RULES["batch"]))
