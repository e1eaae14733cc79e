"""Lengths of captions in tokens against the budget of a run: how many are cut, and how much they lose."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from uae_jax.files import write_whole

if TYPE_CHECKING:
  from uae_jax.data.processing import Processor

# In the workdir: stage -> `CaptionLengths.to_plain()`.
LENGTHS_FILE = "caption_lengths.json"
PERCENTILES = (50, 90, 99)
NUM_BINS = 8
# A caption beyond this number of characters counts as one of this many.
MOST_CHARACTERS = 2**20


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionLengths:
  """Lengths of some captions.

  Attributes:
    tokens: int64[count], tokens per caption with the closing one, sorted; records without a caption are left out.
    budget: `data.caption_tokens`.
  """

  tokens: np.ndarray
  budget: int

  @classmethod
  def of(cls, captions: Sequence[str], processor: "Processor", budget: int) -> "CaptionLengths":
    lengths = [1 + len(processor.encode(text[:MOST_CHARACTERS])) for text in captions if text]
    return cls(np.sort(np.asarray(lengths, np.int64)), budget)

  @property
  def num_cut(self) -> int:
    return int(np.sum(self.tokens > self.budget))

  @property
  def mean_lost(self) -> float:
    """Mean number of tokens that a cut caption loses."""
    return float(np.mean(self.tokens[self.tokens > self.budget] - self.budget)) if self.num_cut else 0.0

  def histogram(self) -> list[tuple[int, int, int]]:
    """(fewest tokens, most tokens, number of captions) of at most `NUM_BINS` bins of equal width."""
    if not len(self.tokens):
      return []
    low, high = int(self.tokens[0]), int(self.tokens[-1])
    width = -(-(high - low + 1) // NUM_BINS)
    counts = np.bincount((self.tokens - low) // width)
    return [(low + i * width, low + (i + 1) * width - 1, int(count)) for i, count in enumerate(counts)]

  def to_plain(self) -> dict[str, Any]:
    """The figures as JSON values; those of a distribution are absent if there is no caption."""
    plain: dict[str, Any] = {"captions": len(self.tokens), "budget": self.budget, "cut": self.num_cut}
    if len(self.tokens):
      percentiles = np.percentile(self.tokens, PERCENTILES, method="higher").tolist()
      plain |= {
        "min": int(self.tokens[0]),
        **{f"p{q}": int(value) for q, value in zip(PERCENTILES, percentiles, strict=True)},
        "max": int(self.tokens[-1]),
        "mean_lost": round(self.mean_lost, 1),
        "histogram": self.histogram(),
      }
    return plain

  def describe(self) -> str:
    """The lengths in one line."""
    plain = self.to_plain()
    if not len(self.tokens):
      return "no captions"
    lost = f", which lose {self.mean_lost:.0f} tokens on average" if self.num_cut else ""
    return (
      f"{plain['captions']} captions have {plain['min']} to {plain['max']} tokens (half up to {plain['p50']}, 90 % up "
      f"to {plain['p90']}, 99 % up to {plain['p99']}); data.caption_tokens = {self.budget} cuts {self.num_cut}{lost}"
    )


def write_lengths(workdir: Path, stage: str, lengths: CaptionLengths) -> None:
  """Adds the lengths of a stage to those in the workdir."""
  merged = {**read_lengths(workdir), stage: lengths.to_plain()}
  write_whole(Path(workdir) / LENGTHS_FILE, json.dumps(merged, indent=2) + "\n")


def read_lengths(workdir: Path) -> dict[str, dict]:
  """Reads the lengths per stage; empty if there are none, or if the file is damaged."""
  try:
    found = json.loads((Path(workdir) / LENGTHS_FILE).read_bytes())
  except (OSError, ValueError, RecursionError):
    return {}
  stages = found.items() if isinstance(found, Mapping) else ()
  return {stage: lengths for stage, lengths in stages if isinstance(lengths, dict)}
