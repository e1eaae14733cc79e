"""Language models whose config ties the head to the embeddings, and whose files may hold a head all the same."""

from collections.abc import Mapping
import hashlib
from pathlib import Path
import warnings

import numpy as np

from uae_jax.weights.tensor_files import Renamed


def ties_embeddings(tensors: Renamed, embedding: str, head: str, folder: Path) -> bool:
  """Whether one matrix is both, as transformers 5 reads a model with `tie_word_embeddings`.

  Two different matrices are both used, which a warning says; a head alone is also the embedding table.

  Args:
    tensors: the model's; a missing embedding table is added.
    embedding: name of the embedding table.
    head: name of the head.
    folder: named in the warning.
  """
  if head not in tensors:
    return True
  if embedding not in tensors:
    tensors.put(embedding, tensors, head)
    return True
  if _digest(tensors, head) == _digest(tensors, embedding):
    return True
  warnings.warn(
    f"{folder}: tie_word_embeddings is true, but {head} differs from {embedding}: both are used, as in transformers 5",
    stacklevel=6,
  )
  return False


def _digest(tensors: Mapping, name: str) -> bytes:
  """Digest of a tensor's shape and values, in float32 and a part at a time."""
  values = np.asarray(tensors[name])
  digest = hashlib.sha256(repr(values.shape).encode())
  for start in range(0, len(values), 4096):
    digest.update(np.ascontiguousarray(values[start : start + 4096], np.float32).tobytes())
  return digest.digest()
