"""Orbax checkpoints of a stage: asynchronous, resumable to the bit, parameters readable alone.

`checkpoints/<stage>/<step>/` holds `state` (what trains, optimizer, average, key), `data` (the iterator's place) and
`config`. The frozen parameters are those the stage started from, so they are not written again; the stage's last step
holds `params`, the whole tree.
"""

from pathlib import Path
import shutil

from absl import logging
import jax
import orbax.checkpoint as ocp

from uae_jax.training.state import State

PARAMS, STATE, DATA, CONFIG = "params", "state", "data", "config"


def _writable(state: State) -> dict:
  """What of a state is written; typed keys as their words."""
  return {
    "step": state.step,
    "skipped": state.skipped,
    "trainable": state.trainable,
    "opt_state": state.opt_state,
    "ema": state.ema,
    "rng": jax.random.key_data(state.rng),
  }


def _abstract(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), tree)


class Checkpoints:
  """The checkpoints of one stage."""

  def __init__(self, directory: Path, *, max_to_keep: int = 2):
    self.directory = Path(directory).absolute()
    options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, create=True)
    self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=(PARAMS, STATE, DATA, CONFIG))

  def save(self, step: int, state: State, data: dict, config: dict) -> None:
    """Starts writing a state; returns as soon as the device arrays are copied."""
    items = {
      STATE: ocp.args.StandardSave(_writable(state)),
      DATA: ocp.args.JsonSave(data),
      CONFIG: ocp.args.JsonSave(config),
    }
    self._manager.save(step, args=ocp.args.Composite(**items), force=True)

  def save_final(self, step: int, params: dict, config: dict) -> None:
    """Writes the stage's whole result and waits until it is on disk."""
    self._manager.wait_until_finished()
    if self._manager.latest_step() == step:
      self._manager.delete(step)
    items = {PARAMS: ocp.args.StandardSave(params), CONFIG: ocp.args.JsonSave(config)}
    self._manager.save(step, args=ocp.args.Composite(**items), force=True)
    self._manager.wait_until_finished()

  def is_final(self, step: int) -> bool:
    return (self.directory / str(step) / PARAMS).exists()

  def steps(self) -> list[int]:
    """Steps on disk, newest first."""
    return sorted(self._manager.all_steps(), reverse=True)

  def restore(self, state: State) -> tuple[State, dict] | None:
    """(state, data iterator's place) of the newest readable step; None if there is none.

    A torn or corrupt step is named in a warning and set aside as `<step>.damaged`, and the one before it is used.

    Args:
      state: of the stage's start, for structure, shardings and frozen parameters.
    """
    target = _abstract(_writable(state))
    for step in self.steps():
      if self.is_final(step):
        continue
      try:
        args = ocp.args.Composite(state=ocp.args.StandardRestore(target), data=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
      except Exception as error:  # Orbax raises many kinds for a damaged step; all mean the same here.
        aside = self.directory / f"{step}.damaged"
        logging.warning("checkpoint %s/%d cannot be read (%s): set aside as %s", self.directory, step, error, aside)
        shutil.rmtree(aside, ignore_errors=True)
        (self.directory / str(step)).rename(aside)
        self._manager.reload()
        continue
      values = restored[STATE]
      rng = jax.random.wrap_key_data(values.pop("rng"))
      return state.replace(**values, rng=rng), restored[DATA]
    return None

  def restore_final(self, abstract_params: dict) -> dict | None:
    """The whole parameters of a finished stage, or None.

    Args:
      abstract_params: `ShapeDtypeStruct`s, with shardings where the result shall be placed.
    """
    for step in self.steps():
      if self.is_final(step):
        args = ocp.args.Composite(params=ocp.args.StandardRestore(abstract_params))
        return self._manager.restore(step, args=args)[PARAMS]
    return None

  def close(self) -> None:
    self._manager.wait_until_finished()
    self._manager.close()
