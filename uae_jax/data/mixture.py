"""Several sources in fixed proportions.

Every source has its own endless sequence of epochs, each a seeded permutation of its records. The mixture takes from
these sequences in turn, by the weights, so that it is as exact and resumable as one source.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from uae_jax.data.prompts_source import PromptsSource

if TYPE_CHECKING:
  import grain

  from uae_jax.data.sources import Stored


class Mixture:
  """The records of several sources; `order` says in which order they are trained on.

  Args:
    sources: the sources.
    weights: share of the records of each source, more than 0; their sum does not matter.
    is_interleaved: numbers the records so that the first ones are of all sources, by the weights; False numbers one
      source after the other.
  """

  def __init__(self, sources: Sequence["Stored"], weights: Sequence[float], *, is_interleaved: bool = False):
    self._sources, self._weights = list(sources), list(weights)
    self._ends = np.cumsum([len(source) for source in self._sources])
    self._numbers = None
    if is_interleaved:
      turns = [np.arange(1, len(source) + 1) / weight for source, weight in zip(sources, weights, strict=True)]
      self._numbers = np.argsort(np.concatenate(turns), kind="stable")

  @property
  def sources(self) -> Sequence["Stored"]:
    return self._sources

  @property
  def weights(self) -> Sequence[float]:
    return self._weights

  @property
  def num_sources(self) -> int:
    return len(self._sources)

  def __len__(self) -> int:
    return int(self._ends[-1])

  def source_of(self, index: int) -> int:
    """The number of the source of a record, from 0."""
    return int(np.searchsorted(self._ends, index if self._numbers is None else self._numbers[index], side="right"))

  def _place(self, index: int) -> tuple["Stored", int]:
    i = self.source_of(index)
    if self._numbers is not None:
      index = int(self._numbers[index])
    return self._sources[i], index - (int(self._ends[i - 1]) if i else 0)

  def __getitem__(self, index: int) -> dict:
    source, i = self._place(index)
    return source[i]

  def caption(self, index: int) -> str:
    source, i = self._place(index)
    return source.caption(i)

  def key(self, index: int) -> str:
    source, i = self._place(index)
    return source.key(i)

  def metadata(self, index: int) -> dict:
    """The metadata of a prompt; empty for a record with an image."""
    source, i = self._place(index)
    return source.metadata(i) if isinstance(source, PromptsSource) else {}

  def fields(self) -> Sequence[str]:
    return tuple(dict.fromkeys(name for source in self._sources for name in source.fields()))

  def fingerprint(self) -> dict[str, int | str]:
    found: dict[str, int | str] = {}
    for i, (source, weight) in enumerate(zip(self._sources, self._weights, strict=True)):
      values = {"weight": str(weight), **source.fingerprint()}
      found |= {f"source {i + 1}, {name}": value for name, value in values.items()}
    return found

  def order(self, seeds: Sequence[int] | None) -> "grain.MapDataset":
    """The endless order of the indices of all records.

    Args:
      seeds: one per source, for its permutations; None keeps the order of each source.
    """
    import grain

    parts, start = [], 0
    for i, source in enumerate(self._sources):
      part = grain.MapDataset.range(start, start + len(source))
      parts.append((part if seeds is None else part.shuffle(seed=seeds[i])).repeat())
      start += len(source)
    return grain.MapDataset.mix(parts, self._weights)
