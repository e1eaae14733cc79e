"""The fingerprint of parameters changes with any bit, place, path or dtype, and is the same on any mesh."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from uae_jax import sharding
from uae_jax.weights.checksums import examine, fingerprint


def params(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  return {
    "a": {"kernel": jnp.asarray(rng.normal(size=(8, 16)), dtype)},
    "b": jnp.asarray(rng.integers(-9, 9, 5), "int8"),
  }


def changed(change):
  tree = params()
  tree["a"]["kernel"] = jnp.asarray(change(np.array(tree["a"]["kernel"])))
  return tree


def flip_lowest_bit(x):
  x.view(np.uint32)[3, 5] ^= 1
  return x


def test_any_difference_changes_it():
  trees = [
    params(),
    params(jnp.bfloat16),
    changed(flip_lowest_bit),
    changed(lambda x: x[::-1].copy()),
    changed(lambda x: x.reshape(16, 8)),
    {"c": params()["a"], "b": params()["b"]},
  ]
  assert len({fingerprint(tree) for tree in trees}) == len(trees)
  assert fingerprint(params()) == fingerprint(params())


def test_it_is_the_same_on_a_mesh():
  tree = params()
  mesh = sharding.make_mesh(fsdp=4, tensor=2)
  place = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
  sharded = {"a": {"kernel": jax.device_put(tree["a"]["kernel"], place)}, "b": tree["b"]}
  assert fingerprint(sharded) == fingerprint(tree)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "uint32", "bool"])
@pytest.mark.parametrize("shape", [(), (0, 4), (8,), (4, 1500, 400)])
def test_the_host_computes_what_devices_do(dtype, shape):
  """An array on one CPU device is read by NumPy, in chunks; the same array on several by a program."""
  x = jnp.asarray(np.random.default_rng(0).integers(0, 2**31, shape) % 251, dtype)
  replicated = jax.device_put(x, NamedSharding(sharding.make_mesh(fsdp=8), PartitionSpec()))
  assert examine(x) == examine(replicated)
  assert examine(x)[1]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_found_on_host_and_devices(value):
  x = jnp.zeros(9, jnp.bfloat16).at[4].set(value)
  replicated = jax.device_put(x, NamedSharding(sharding.make_mesh(fsdp=8), PartitionSpec()))
  assert examine(x) == examine(replicated)
  assert not examine(x)[1]
