"""The fingerprint of parameters changes with any bit, place, path or dtype, and is the same on any mesh."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from uae_jax import sharding
from uae_jax.weights.checksums import fingerprint


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
