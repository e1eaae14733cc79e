"""The mesh: which shapes it refuses, and that weights are gathered exactly where they are used."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uae_jax import sharding
from uae_jax.layers.lora import Linear

pytestmark = pytest.mark.fast


class Device:
  """The attributes of a device that are accessed before a mesh is refused."""

  def __init__(self, slice_index: int):
    self.slice_index = slice_index


def test_a_mesh_of_the_wrong_size_is_refused():
  with pytest.raises(ValueError, match=r"mesh \(data=1, fsdp=16, tensor=1\) needs 16 devices, found 8: change config"):
    sharding.make_mesh(fsdp=16)


def test_a_long_fsdp_axis_is_refused():
  with pytest.raises(ValueError, match=r"fsdp may be at most 32.* config.mesh.fsdp=32 and config.mesh.data=2"):
    sharding.make_mesh(fsdp=64, devices=[Device(0)] * 64)


def test_slices_need_a_data_axis():
  with pytest.raises(ValueError, match="data = 1 does not divide by 2 slices"):
    sharding.make_mesh(fsdp=8, devices=[Device(i // 4) for i in range(8)])


def test_heads_that_do_not_divide_are_refused():
  mesh = sharding.make_mesh(data=2, tensor=4)
  with pytest.raises(ValueError, match="decoder has 38 heads, which do not divide by tensor = 4"):
    sharding.check_heads("decoder", 38, mesh)


def test_a_weight_that_does_not_divide_is_refused():
  mesh = sharding.make_mesh(data=2, fsdp=4)
  with pytest.raises(ValueError, match=r"kernel \(6, 8\): 6 does not divide by fsdp = 4: change config.mesh.fsdp"):
    sharding.abstract_model(lambda: Linear(6, 8, axes=("embed", "mlp"), rngs=nnx.Rngs(0)), mesh)


def test_gather_drops_fsdp_and_keeps_tensor():
  """The value is unchanged; its gradient is sharded like the weight."""
  mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
  weight = jnp.arange(64.0).reshape(8, 8)
  cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor"))
  with jax.set_mesh(mesh):
    whole = jax.jit(lambda w: sharding.gather(w, "embed", "mlp"))(jax.device_put(weight, cut))
    gradient = jax.jit(jax.grad(lambda w: jnp.sum(jnp.square(sharding.gather(w, "embed", "mlp")))))(weight)
  assert whole.sharding.spec == jax.sharding.PartitionSpec(None, "tensor")
  assert gradient.sharding.spec == cut.spec
  np.testing.assert_array_equal(whole, weight)
  np.testing.assert_array_equal(gradient, 2 * weight)


def test_gathered_reaches_every_leaf_of_a_module():
  mesh = sharding.make_mesh(data=2, fsdp=4)
  build = lambda: Linear(8, 8, axes=("embed", "mlp"), rngs=nnx.Rngs(0))  # noqa: E731
  graphdef, abstract = sharding.abstract_model(build, mesh)
  params = jax.tree.map(lambda leaf: jax.device_put(jnp.ones(leaf.shape), leaf.sharding), abstract)
  assert not params["kernel"].sharding.is_fully_replicated
  with jax.set_mesh(mesh):
    whole = jax.jit(lambda p: nnx.to_pure_dict(nnx.state(sharding.gathered(nnx.merge(graphdef, p)))))(params)
  assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(whole))
