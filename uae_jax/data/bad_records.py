"""Counts unreadable records, names them, and ends the run when there are too many."""

import threading

from absl import logging

from uae_jax.files import shown


def describe(error: Exception) -> str:
  """Describes in one line why a record is unreadable."""
  kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
  return shown(" ".join(f"{kind}{error}".split()))


class BadRecords:
  """Counts unreadable records, which are skipped, and raises if there are too many. Thread-safe.

  A record counts once over all epochs. The fraction is relative to the number of records read so far, but at least to
  one process's share of an epoch, and at most to the size of the source.

  Args:
    max_fraction: `config.data.max_bad_fraction`, in [0, 1].
    num_records: number of records of the source.
    process_count: number of processes that share an epoch.
    indices: receives the indices of unreadable records; worker processes keep their own.
  """

  def __init__(self, max_fraction: float, num_records: int, process_count: int = 1, indices: set[int] | None = None):
    self._max_fraction, self._num_records, self._process_count = max_fraction, num_records, process_count
    self._lock = threading.Lock()
    self._num_read = 0
    self._bad = set() if indices is None else indices

  def good(self) -> None:
    with self._lock:
      self._num_read += 1

  def bad(self, index: int, key: str, error: Exception) -> None:
    """Counts and logs an unreadable record.

    Raises:
      ValueError: there are too many unreadable records.
    """
    with self._lock:
      self._num_read += 1
      is_new = index not in self._bad
      self._bad.add(index)
      num_bad = len(self._bad)
      num_read = min(max(self._num_read, -(-self._num_records // self._process_count)), self._num_records)
    key, reason = shown(key), describe(error)
    if is_new:
      logging.warning("skipped record %s (%s); %d skipped so far", key, reason, num_bad)
    # Even with max_fraction 1, a source without any readable record must not be read forever.
    if num_bad > self._max_fraction * num_read or num_bad == num_read:
      raise ValueError(
        f"{num_bad} of {num_read} records are unreadable, more than data.max_bad_fraction = {self._max_fraction}; "
        f"the last one: {key} ({reason}). Repair or remove them, or raise data.max_bad_fraction"
      ) from error

  # Every worker process counts for itself.
  def __getstate__(self):
    return (self._max_fraction, self._num_records, self._process_count)

  def __setstate__(self, state):
    BadRecords.__init__(self, *state)
