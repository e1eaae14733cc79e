"""Checks the numbers of a tree on its devices: a checksum of every leaf, and whether all of them are finite.

A checksum is the sum over all elements of a hash of their bits and their position, modulo 2^32. It does not depend on
the sharding, every change of one element changes it, and any other change goes unnoticed with probability 2^-32. Each
device reads its shards once; nothing is copied to the host and no file is read again.
"""

import json
from typing import Any
import zlib

import jax
import jax.numpy as jnp

ADVICE = "lower the stage's optimizer.learning_rate, which may change when a run is resumed"


class NonFiniteError(RuntimeError):
  """Raised when loss, gradient, parameters or optimizer state are not finite; the last good state stays on disk."""


@jax.jit
def _inspect(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns (checksum uint32[], whether all elements are finite bool[]) of an array."""
  bits = x if x.dtype == bool else jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
  position = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  h = bits.astype(jnp.uint32) ^ (position * jnp.uint32(0x9E3779B1))
  # The finalizer of MurmurHash3, a bijection.
  h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
  h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
  is_finite = jnp.all(jnp.isfinite(x)) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.bool_(True)
  return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32), is_finite


def inspect(tree: Any) -> tuple[dict[str, int], bool]:
  """Returns ({path of a leaf: checksum}, whether all numbers are finite); every process must call it."""
  # One program per shape and dtype, which master weights, moments and averages share; one in flight at a time, because
  # XLA's CPU backend can deadlock over the reductions of several.
  found = {jax.tree_util.keystr(path): jax.device_get(_inspect(x)) for path, x in jax.tree.leaves_with_path(tree)}
  checksums = {path: int(checksum) for path, (checksum, _) in found.items()}
  return checksums, all(bool(is_finite) for _, is_finite in found.values())


def checksum_of_json(value: Any) -> int:
  """Returns the checksum of a JSON value."""
  return zlib.crc32(json.dumps(value, sort_keys=True).encode())
