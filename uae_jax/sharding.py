"""The mesh, the one table of logical axis rules, and abstract models that know where every leaf lives.

Weights are annotated where they are made with logical names (`("embed", "mlp")`); activations are pinned with
`constrain`. A run chooses only the mesh shape `(data, fsdp, tensor)`; an axis of size 1 switches its rules off.

A weight rests cut over `fsdp` and is made whole by `gather` where it is used, so that one layer is whole at a time.
"""

from collections.abc import Callable
import functools
import math

from flax import nnx
import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

MESH_AXES = ("data", "fsdp", "tensor")
# On v5p slices of 64 chips XLA turns all-gathers over one axis of 64 into all-reduces, at twice the traffic (seen in
# compiled programs; 32 and less are real gathers on every slice tried). What is beyond belongs on `data`.
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
  # Qwen2.5-VL-3B has two kv heads: any larger tensor axis could not divide them.
  "kv_heads": None,
  "mlp": "tensor",
  "vocab": "tensor",
  "lora": None,
  # The long side of an adapter's factor is always cut over fsdp, also where its layer's is not.
  "adapter": "fsdp",
  "adapter_tensor": ("fsdp", "tensor"),
  "patch": None,
  "conv_in": None,
  "conv_out": None,
}


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
  """A mesh with Auto axes (`jax.make_mesh` alone makes Explicit ones).

  Devices of several slices make a hybrid mesh: `data` goes over the network between slices, `fsdp` and `tensor` stay on
  the links inside one.

  Raises:
    ValueError: the axes do not fit the devices or their slices, or `fsdp` is too long.
  """
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
  num_slices = len({getattr(device, "slice_index", 0) for device in devices})
  if num_slices == 1:
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
  if data % num_slices:
    raise ValueError(
      f"{text}: data = {data} does not divide by {num_slices} slices, and only data goes over the network "
      "between them: change config.mesh.data"
    )
  inside = (data // num_slices, fsdp, tensor)
  array = mesh_utils.create_hybrid_device_mesh(inside, (num_slices, 1, 1), devices)
  return Mesh(array, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Pins an activation to the mesh by logical axis names; the identity outside `jax.set_mesh` or on one device."""
  return _pin(x, _cut(axes)) if jax.sharding.get_abstract_mesh().size > 1 else x


def gather(weight: jax.Array, *axes: str | None) -> jax.Array:
  """A weight whole over `fsdp`, still cut over `tensor`; the identity where there is no `fsdp`.

  Its gradient comes back cut as the weight is: a reduce-scatter, and no more than one layer of it whole.

  Args:
    weight: any array, of one layer.
    axes: its logical names.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return weight if mesh.shape.get("fsdp", 1) == 1 else _gather(weight, axes)


def mesh_axes(rule: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """The mesh axes of a rule, or of an entry of a `PartitionSpec`."""
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


def gathered(module: nnx.Module) -> nnx.Module:
  """The module with all its weights whole over `fsdp`, layers stacked or not.

  For loops that use every weight many times: decoding would gather the whole net for every token.
  """

  def whole(variable: nnx.Variable) -> nnx.Variable:
    axes = variable.get_metadata("out_sharding", (None,) * variable[...].ndim)
    return variable.replace(gather(variable[...], *axes))

  graphdef, state = nnx.split(module)
  return nnx.merge(graphdef, jax.tree.map(whole, state, is_leaf=lambda x: isinstance(x, nnx.Variable)))


def abstract_model(build: Callable[[], nnx.Module], mesh: Mesh):
  """(graphdef, nested dict of ShapeDtypeStruct with shardings) of `build()`; allocates nothing."""
  with nnx.use_eager_sharding(False), nnx.logical_axis_rules(tuple(RULES.items())):
    graphdef, state = nnx.get_abstract_model(build, mesh)
  params = nnx.to_pure_dict(state)
  check_divisible(params, mesh)
  return graphdef, params


def check_divisible(tree: dict, mesh: Mesh) -> None:
  """Raises `ValueError` where the rules cut a dimension into unequal parts, naming the array and the setting."""
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
  """Raises `ValueError` where attention heads do not divide over `tensor`."""
  if num_heads % mesh.shape["tensor"]:
    raise ValueError(
      f"{name} has {num_heads} heads, which do not divide by tensor = {mesh.shape['tensor']}: change config.mesh.tensor"
    )


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Leading axis over `data` and `fsdp`."""
  return NamedSharding(mesh, PartitionSpec(RULES["batch"]))
