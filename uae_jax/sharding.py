"""The mesh, the one table of logical axis rules, and abstract models that know where every leaf lives.

Weights are annotated where they are made with logical names (`("embed", "mlp")`); activations are pinned with
`constrain`. A run chooses only the mesh shape `(data, fsdp, tensor)`; an axis of size 1 switches its rules off.
"""

from collections.abc import Callable

from flax import nnx
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

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
  "patch": None,
  "conv_in": None,
  "conv_out": None,
}


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
  """A mesh with Auto axes (`jax.make_mesh` alone makes Explicit ones).

  Raises:
    ValueError: the product of the axes is not the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  if data * fsdp * tensor != len(devices):
    raise ValueError(
      f"mesh (data={data}, fsdp={fsdp}, tensor={tensor}) needs {data * fsdp * tensor} devices, "
      f"found {len(devices)}: change config.mesh"
    )
  return jax.make_mesh((data, fsdp, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Pins an activation to the mesh by logical axis names; the identity outside a mesh."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  spec = PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))
  return jax.lax.with_sharding_constraint(x, spec)


def abstract_model(build: Callable[[], nnx.Module], mesh: Mesh):
  """(graphdef, nested dict of ShapeDtypeStruct with shardings) of `build()`; allocates nothing."""
  with nnx.use_eager_sharding(False), nnx.logical_axis_rules(tuple(RULES.items())):
    graphdef, state = nnx.get_abstract_model(build, mesh)
  return graphdef, nnx.to_pure_dict(state)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Leading axis over `data` and `fsdp`."""
  return NamedSharding(mesh, PartitionSpec(RULES["batch"]))
