"""Batches of a stage on the mesh; every process loads its part, and the position in the data can be saved."""

from pathlib import Path

from absl import logging
import jax
from jax.sharding import Mesh
import numpy as np

from uae_jax import sharding
from uae_jax.data.caption_lengths import CaptionLengths, write_lengths
from uae_jax.data.pipeline import assign_buckets, make_dataset, repartition
from uae_jax.data.sources import Stored, open_source
from uae_jax.training import processes
from uae_jax.training.data_check import NUM_CAPTIONS, sample

# Least number of rows that the fraction of cut captions is taken of, so that one of the first rows does not exceed it.
LEAST_ROWS = 1000


class Batches:
  """Endless iterator over global batches.

  Args:
    config: data source, and the captions and batch size of the stage.
    name: name of the stage.
    processor: tokenizer and image processor of the captioner.
    mesh: mesh of the batches, which are sharded over `data` and `fsdp`.
    seed: determines the order of the data and what partial captions leave out.
    needs_captions: whether the stage trains on the captions; they are then checked and counted.
    workdir: folder of the run, in which the lengths of the captions are noted; None notes nothing.

  Raises:
    ValueError: the data cannot be read, differ between processes, or have too many captions that are cut.
  """

  def __init__(
    self,
    config,
    name: str,
    processor,
    mesh: Mesh,
    seed: int,
    *,
    needs_captions: bool = False,
    workdir: Path | None = None,
  ):
    self._name, self._data, self._processor = name, config.data, processor
    self._source = open_source(config.data, "train")
    self._sharding = sharding.batch_sharding(mesh)
    self._part, self._num_parts = processes.batch_part(mesh)
    self._bad: set[int] = set()
    # Captions that were cut and all captions: of this process since the last `counts`, and of all since the start.
    self._counts_captions, self._recent, self._total = needs_captions, np.zeros(2, int), np.zeros(2, int)
    source = self._source
    if isinstance(source, Stored):
      check_same(source.fingerprint(), config.data.source)
      if needs_captions:
        processes.on_first(lambda: self._check_sample(source, workdir))
    buckets = None
    if config.data.buckets:
      buckets = assign_buckets(source, config.data, self._part, self._num_parts, self._bad)
      check_same(buckets.fingerprint(), config.data.source)
      logging.info("%s: %s", name, buckets.describe())
    dataset = make_dataset(
      self._source,
      config.data,
      processor,
      captions=config.section(name).captions,
      batch_size=config.section(name).batch_size,
      seed=seed,
      process_index=self._part,
      process_count=self._num_parts,
      needs_captions=needs_captions,
      bad_indices=self._bad,
      buckets=buckets,
    )
    self._iterator = iter(dataset)

  def __next__(self) -> dict[str, jax.Array]:
    batch = next(self._iterator)
    if self._counts_captions:
      self._recent += self._count_cut(batch["tokens"], batch["length"])
    return processes.place(batch, self._sharding, self._num_parts)

  def get_state(self) -> dict:
    """Returns the positions of all parts; every process gets the same value."""
    own = {"part": self._part, "iterator": self._iterator.get_state(), "bad_indices": sorted(self._bad)}
    parts = {state["part"]: state for state in processes.gather(own)}
    return {"parts": [parts[part] for part in sorted(parts)]}

  def set_state(self, state: dict) -> None:
    """Moves to saved positions, also if they were saved with another number of parts."""
    parts = state["parts"]
    if len(parts) == self._num_parts:
      self._iterator.set_state(parts[self._part]["iterator"])
      self._bad.update(parts[self._part]["bad_indices"])
    else:
      self._iterator.set_state(repartition(self._source, [part["iterator"] for part in parts], self._num_parts))

  def counts(self) -> dict[str, float]:
    """Returns metrics of the data, over all parts; every process must call it.

    `bad_records` is the number of unreadable records that were skipped so far. `cut_captions`, where captions are
    trained on, is the fraction of captions since the previous call that were longer than `data.caption_tokens`.

    Raises:
      ValueError: more captions were cut than `data.max_cut_fraction` allows.
    """
    own = [self._part, len(self._bad), *map(int, self._recent)]
    parts = {part: values for part, *values in processes.gather(own)}
    self._recent[:] = 0
    bad, *recent = np.sum(list(parts.values()), axis=0)
    if not self._counts_captions:
      return {"bad_records": float(bad)}
    self._total += recent
    cut, rows = self._total
    if cut > self._data.max_cut_fraction * max(rows, min(LEAST_ROWS, len(self._source))):
      raise ValueError(self._too_many(f"{cut} of {rows} captions so far"))
    return {"bad_records": float(bad), "cut_captions": float(recent[0] / max(recent[1], 1))}

  def _count_cut(self, tokens: np.ndarray, length: np.ndarray) -> np.ndarray:
    """(captions that were cut, captions) of tokens int[..., L] and their lengths int[...]."""
    is_cut = (length == tokens.shape[-1]) & (tokens[..., -1] != self._processor.end_ids[0])
    return np.asarray([np.sum(is_cut), length.size])

  def _check_sample(self, source: Stored, workdir: Path | None) -> None:
    """Says how long captions are, and raises if clearly too many will be cut, before the stage trains."""
    captions, _ = sample(source, source.caption, NUM_CAPTIONS)
    lengths = CaptionLengths.of(captions, self._processor, self._data.caption_tokens)
    log = logging.warning if lengths.num_cut else logging.info
    log("%s: of the data that were looked at, %s", self._name, lengths.describe())
    if workdir is not None:
      write_lengths(workdir, self._name, lengths)
    is_exact = len(captions) == len(source) or not self._data.max_cut_fraction
    # Two standard deviations of a count: what a sample may contain by chance.
    cut = lengths.num_cut
    if cut - (0 if is_exact else 2 * cut**0.5) > self._data.max_cut_fraction * len(captions):
      raise ValueError(self._too_many(f"{cut} of {len(captions)} captions that were looked at"))

  def _too_many(self, captions: str) -> str:
    return (
      f"{self._name}: {captions} are longer than data.caption_tokens = {self._data.caption_tokens} and are cut, more "
      f"than data.max_cut_fraction = {self._data.max_cut_fraction}: raise one of the two, or shorten the captions"
    )


def check_same(fingerprint: dict, source: str) -> None:
  """Checks that every process reads the same data, since each of them computes the order of all records.

  Raises:
    ValueError: two processes read different data.
  """
  for index, other in enumerate(processes.gather(fingerprint)):
    if other != fingerprint:
      raise ValueError(
        f"data.source = {source!r} is not the same on all processes: {fingerprint} on process {jax.process_index()}, "
        f"{other} on process {index}: copy the same files to every host"
      )
