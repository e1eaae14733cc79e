"""A hash of parameters, computed where they are: on any mesh, without a copy on the host."""

import hashlib

import jax
import jax.numpy as jnp

from uae_jax import trees

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def fingerprint(params: dict) -> str:
  """Returns 16 hexadecimal digits that differ if any bit, path, shape or dtype of the parameters differs.

  It detects accidents, not attacks: two sums of products modulo 2^32 per array, then SHA-256.

  Args:
    params: nested dict of arrays of 1, 2 or 4 bytes per element.
  """
  digest = hashlib.sha256()
  for path, leaf in sorted(trees.items(params)):
    first, second = (int(value) for value in _sums(leaf))
    digest.update(f"{path} {leaf.dtype} {leaf.shape} {first:08x} {second:08x}\n".encode())
  return digest.hexdigest()[:16]


@jax.jit
def _sums(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Two sums uint32 over all elements, with weights that depend on the position."""
  words = jax.lax.bitcast_convert_type(leaf, _BITS[leaf.dtype.itemsize]).astype(jnp.uint32)
  place = jnp.zeros(leaf.shape, jnp.uint32)
  for axis, size in enumerate(leaf.shape):
    place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
  # Odd multipliers are invertible modulo 2^32, so a single changed element always changes the sum.
  weights = [(place * jnp.uint32(factor)) | jnp.uint32(1) for factor in (2654435761, 2246822519)]
  return jnp.sum(words * weights[0], dtype=jnp.uint32), jnp.sum(words * weights[1], dtype=jnp.uint32)
