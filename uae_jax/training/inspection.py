"""Checks the numbers of a tree on its devices: a checksum of every leaf, and whether all of them are finite.

Each device reads its shards once; nothing is copied to the host, and no file is read again.
"""

import json
from typing import Any
import zlib

import jax

from uae_jax.weights.checksums import examine

ADVICE = "lower the stage's optimizer.learning_rate, which may change when a run is resumed"


class NonFiniteError(RuntimeError):
  """Raised when loss, gradient, parameters or optimizer state are not finite; the last good state stays on disk."""


def inspect(tree: Any) -> tuple[dict[str, int], bool]:
  """Returns ({path of a leaf: checksum}, whether all numbers are finite); every process must call it."""
  found = {jax.tree_util.keystr(path): examine(x) for path, x in jax.tree.leaves_with_path(tree)}
  return {path: checksum for path, (checksum, _) in found.items()}, all(is_finite for _, is_finite in found.values())


def checksum_of_json(value: Any) -> int:
  """Returns the checksum of a JSON value."""
  return zlib.crc32(json.dumps(value, sort_keys=True).encode())
