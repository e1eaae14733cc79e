"""Checks the numbers of a tree on its devices: a checksum of every leaf, and whether all of them are finite.

Each device reads its shards once; nothing is copied to the host and no file is read again.
"""

import json
from typing import Any
import zlib

import jax
import jax.numpy as jnp

from uae_jax.weights.checksums import checksum

ADVICE = "lower the stage's optimizer.learning_rate, which may change when a run is resumed"


class NonFiniteError(RuntimeError):
  """Raised when loss, gradient, parameters or optimizer state are not finite; the last good state stays on disk."""


@jax.jit
def _inspect(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns (checksum uint32[], whether all elements are finite bool[]) of an array."""
  is_finite = jnp.all(jnp.isfinite(x)) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.bool_(True)
  return checksum(x), is_finite


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
