"""The batches of a stage on the mesh: every process loads its part, and the place in the data can be saved."""

import jax
from jax.sharding import Mesh

from uae_jax import sharding
from uae_jax.data.pipeline import make_dataset, repartition
from uae_jax.data.sources import open_source
from uae_jax.training import processes


class Batches:
  """Endless global batches.

  Args:
    config: of the run.
    name: of the stage.
    processor: of the captioner.
    mesh: where batches go, cut over `data` and `fsdp`.
    seed: of this stage in this run.
  """

  def __init__(self, config, name: str, processor, mesh: Mesh, seed: int):
    self._source = open_source(config.data, "train")
    self._sharding = sharding.batch_sharding(mesh)
    self._part, self._num_parts = processes.batch_part(mesh)
    self._bad: set[int] = set()
    dataset = make_dataset(
      self._source,
      config.data,
      processor,
      captions=config.section(name).captions,
      batch_size=config.section(name).batch_size,
      seed=seed,
      process_index=self._part,
      process_count=self._num_parts,
      bad_indices=self._bad,
    )
    self._iterator = iter(dataset)

  def __next__(self) -> dict[str, jax.Array]:
    return processes.place(next(self._iterator), self._sharding, self._num_parts)

  def get_state(self) -> dict:
    """The place of all parts, the same on every process."""
    own = {"part": self._part, "iterator": self._iterator.get_state(), "bad_indices": sorted(self._bad)}
    parts = {state["part"]: state for state in processes.gather(own)}
    return {"parts": [parts[part] for part in sorted(parts)]}

  def set_state(self, state: dict) -> None:
    """Goes to a saved place, of as many parts as now or of another number."""
    parts = state["parts"]
    if len(parts) == self._num_parts:
      self._iterator.set_state(parts[self._part]["iterator"])
      self._bad.update(parts[self._part]["bad_indices"])
    else:
      self._iterator.set_state(repartition(self._source, [part["iterator"] for part in parts], self._num_parts))

  def num_bad(self) -> int:
    """Unreadable records that were skipped, in all parts."""
    return sum(dict(processes.gather([self._part, len(self._bad)])).values())
