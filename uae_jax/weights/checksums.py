"""Checksums of arrays, computed where the arrays are: on any mesh, without a copy on the host.

A checksum is the sum over all elements of a hash of their bits and their position, modulo 2^32. It does not depend on
the sharding, every change of one element changes it, and any other change goes unnoticed with probability 2^-32. It
detects accidents, not attacks.
"""

import hashlib
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

# Elements that NumPy hashes at a time.
CHUNK = 1 << 20

Array = TypeVar("Array", jax.Array, np.ndarray)


def examine(x: jax.Array | np.ndarray) -> tuple[int, bool]:
  """Computes (checksum, whether all elements are finite) of an array; every process of its mesh must call it.

  Args:
    x: array of any shape, with 1, 2 or 4 bytes per element.
  """
  if isinstance(x, np.ndarray) or [device.platform for device in x.devices()] == ["cpu"]:
    return _on_host(np.asarray(x))  # NumPy reads it in place, and compiles nothing.
  # One program per shape and dtype, which master weights, moments and averages share; one in flight at a time, because
  # XLA's CPU backend can deadlock over the reductions of several.
  checksum, is_finite = jax.device_get(_on_devices(x))
  return int(checksum), bool(is_finite)


def fingerprint(params: Any) -> str:
  """Returns 16 hexadecimal digits that differ if any bit, path, shape or dtype of the parameters differs.

  Args:
    params: tree of arrays, quantized ones included.
  """
  digest = hashlib.sha256()
  for path, leaf in jax.tree.leaves_with_path(params):
    checksum, _ = examine(leaf)
    digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape} {checksum:08x}\n".encode())
  return digest.hexdigest()[:16]


def _hash(bits: Array, position: Array) -> Array:
  """Hashes elements uint32[...] with their positions in the flat array uint32[...]."""
  h = bits ^ (position * np.uint32(0x9E3779B1))
  # The finalizer of MurmurHash3, a bijection.
  h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
  h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
  return h ^ (h >> np.uint32(16))


@jax.jit
def _on_devices(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  bits = x if x.dtype == bool else jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
  position = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  is_finite = jnp.all(jnp.isfinite(x)) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.bool_(True)
  return jnp.sum(_hash(bits.astype(jnp.uint32), position), dtype=jnp.uint32), is_finite


def _on_host(x: np.ndarray) -> tuple[int, bool]:
  flat, checksum, is_finite = x.reshape(-1), 0, True
  bits = flat.view(f"uint{8 * flat.dtype.itemsize}")
  for start in range(0, flat.size, CHUNK):
    chunk = bits[start : start + CHUNK].astype(np.uint32)
    position = np.arange(start, start + chunk.size, dtype=np.uint64).astype(np.uint32)
    checksum += int(np.sum(_hash(chunk, position), dtype=np.uint32))
    if jnp.issubdtype(flat.dtype, jnp.inexact):
      is_finite = is_finite and bool(np.all(np.isfinite(flat[start : start + CHUNK])))
  return checksum % 2**32, is_finite
