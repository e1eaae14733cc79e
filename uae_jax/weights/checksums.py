"""Checksums of arrays, computed on their devices: on any mesh, without a copy on the host.

A checksum is the sum over all elements of a hash of their bits and their position, modulo 2^32. It does not depend on
the sharding, every change of one element changes it, and any other change goes unnoticed with probability 2^-32. It
detects accidents, not attacks.
"""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp


def checksum(x: jax.Array) -> jax.Array:
  """Computes the checksum uint32[] of an array of any shape, with 1, 2 or 4 bytes per element."""
  bits = x if x.dtype == bool else jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
  position = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  h = bits.astype(jnp.uint32) ^ (position * jnp.uint32(0x9E3779B1))
  # The finalizer of MurmurHash3, a bijection.
  h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
  h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
  return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)


def fingerprint(params: Any) -> str:
  """Returns 16 hexadecimal digits that differ if any bit, path, shape or dtype of the parameters differs.

  Args:
    params: tree of arrays, quantized ones included.
  """
  digest, run = hashlib.sha256(), jax.jit(checksum)
  for path, leaf in jax.tree.leaves_with_path(params):
    # One program in flight at a time: XLA's CPU backend can deadlock over the reductions of several.
    digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape} {int(run(leaf)):08x}\n".encode())
  return digest.hexdigest()[:16]
