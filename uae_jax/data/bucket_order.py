"""The endless order of records where every batch is of one bucket.

Every bucket has its own endless sequence of epochs, each a seeded permutation of its records; the last batch of an
epoch is filled with the first records of the next. Buckets take turns in exact proportion to their records, so that
after n epochs every bucket has given as many whole batches as it has in n epochs: every record occurs once per epoch,
but for those that wait for the batch that crosses its end. The order is a function of position, seed and batch size
only: nothing else must be saved to resume, and it does not depend on the number of processes.
"""

from collections.abc import Sequence
from fractions import Fraction
import functools
import math

import grain
import numpy as np

from uae_jax.data.buckets import Buckets
from uae_jax.data.mixture import Mixture
from uae_jax.data.sources import Source
from uae_jax.draws import Draws


def turn(rates: Sequence[int], k: int) -> tuple[int, int]:
  """Which of several endless streams gives the k-th element, and which of its elements that is.

  Element j of a stream of rate r is due at time (j + 1) / r; of elements due at one time, that of the first stream
  comes first. At every whole time, each stream has therefore given exactly its share.

  Args:
    rates: positive integers.
    k: position, from 0.
  """
  total = sum(rates)
  for stream, rate in enumerate(rates):
    # The elements due before the j-th one of this stream number between (j + 1) total / rate - len(rates) and that.
    first, last = -(-(k + 1) * rate // total), (k + len(rates)) * rate // total
    for due in range(max(first, 1), last + 1):
      before = due - 1
      for other, other_rate in enumerate(rates):
        if other < stream:
          before += due * other_rate // rate
        elif other > stream:
          before += -(-due * other_rate // rate) - 1
      if before == k:
        return stream, due - 1
  raise AssertionError(f"no stream of rates {rates} has position {k}")


def proportions(shares: Sequence[Fraction]) -> list[int]:
  """The smallest integers in proportion to positive fractions."""
  whole = math.lcm(*(share.denominator for share in shares))
  values = [int(share * whole) for share in shares]
  divisor = math.gcd(*values)
  return [value // divisor for value in values]


class BucketOrder(grain.MapDataset):
  """Indices of records; each run of `batch_size` of them is of one bucket.

  Args:
    source: the records; of a mixture, every bucket takes from the sources by their weights.
    buckets: their buckets.
    batch_size: global batch size.
    seed: seed of the permutations; None keeps the order of the source within a bucket.

  Raises:
    ValueError: no record has a bucket.
  """

  def __init__(self, source: Source, buckets: Buckets, batch_size: int, seed: int | None):
    sources, weights = (source.sources, source.weights) if isinstance(source, Mixture) else ([source], [1.0])
    ends = np.cumsum([len(part) for part in sources])
    usable = [np.flatnonzero(buckets.of[end - len(part) : end] >= 0) for part, end in zip(sources, ends, strict=True)]
    members: list[list[np.ndarray]] = []
    shares: list[list[Fraction]] = []
    for bucket in range(len(buckets.sizes)):
      found, found_shares = [], []
      for part, end, some, weight in zip(sources, ends, usable, weights, strict=True):
        indices = np.flatnonzero(buckets.of[end - len(part) : end] == bucket) + (end - len(part))
        if len(indices):
          found.append(indices)
          found_shares.append(Fraction(str(weight)) * Fraction(len(indices), len(some)))
      if found:
        members.append(found)
        shares.append(found_shares)
    if not members:
      raise ValueError("data.buckets: no bucket takes any picture")
    count = sum(map(len, members))
    seeds = None if seed is None else iter(Draws(seed).integers(2**32, count).tolist())
    streams = []
    for found in members:
      ranges = [grain.MapDataset.range(len(indices)) for indices in found]
      streams.append([(part if seeds is None else part.shuffle(seed=next(seeds))).repeat() for part in ranges])
    super().__init__([stream for found in streams for stream in found])
    self._members, self._streams, self._batch_size = members, streams, batch_size
    self._rates = proportions([sum(found, Fraction()) for found in shares])
    self._rates_within = [proportions(found) for found in shares]

  def __len__(self) -> int:
    return 2**62

  def __getitem__(self, position):
    if isinstance(position, slice):
      return self.slice(position)
    batch, row = divmod(position, self._batch_size)
    bucket, number = _turn(tuple(self._rates), batch)
    element = number * self._batch_size + row
    part, element = turn(self._rates_within[bucket], element)
    return int(self._members[bucket][part][self._streams[bucket][part][element]])


@functools.lru_cache(maxsize=256)
def _turn(rates: tuple[int, ...], k: int) -> tuple[int, int]:
  """`turn`, remembered for the rows of a batch."""
  return turn(rates, k)
