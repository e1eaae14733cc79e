"""Batches of the Python API: items of one shape share a program."""

from collections.abc import Hashable, Iterator, Sequence
import math

from uae_jax.api.arguments import checked_whole


def fitting(latents_shape: Sequence[int]) -> int:
  """Default number of images per batch: as many as 8 images of 64 x 64 latents (512 px) have together, 1 to 16."""
  return max(1, min(16, 8 * 64**2 // (latents_shape[0] * latents_shape[1])))


def batches_of(groups: Sequence[Hashable], batch_size: int) -> Iterator[list[int]]:
  """Yields batches of positions of one group, padded to a power of two by repeating the last position.

  Args:
    groups: group of each position.
    batch_size: maximum number of positions per batch.

  Raises:
    ValueError: `batch_size` is less than 1.
  """
  batch_size = checked_whole("batch_size", batch_size, 1, math.inf)
  positions: dict[Hashable, list[int]] = {}
  for position, group in enumerate(groups):
    positions.setdefault(group, []).append(position)
  for rows in positions.values():
    for start in range(0, len(rows), batch_size):
      batch = rows[start : start + batch_size]
      padded = min(batch_size, 1 << (len(batch) - 1).bit_length())
      yield batch + batch[-1:] * (padded - len(batch))
