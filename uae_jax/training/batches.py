"""Batches of a stage on the mesh; every process loads its part, and the position in the data can be saved."""

import jax
from jax.sharding import Mesh

from uae_jax import sharding
from uae_jax.data.pipeline import make_dataset, repartition
from uae_jax.data.sources import open_source
from uae_jax.training import processes


class Batches:
  """Endless iterator over global batches.

  Args:
    config: data source, and the captions and batch size of the stage.
    name: name of the stage.
    processor: tokenizer and image processor of the captioner.
    mesh: mesh of the batches, which are sharded over `data` and `fsdp`.
    seed: determines the order of the data and what partial captions leave out.
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

  def num_bad(self) -> int:
    """Returns the number of unreadable records that were skipped, over all parts."""
    return sum(dict(processes.gather([self._part, len(self._bad)])).values())
