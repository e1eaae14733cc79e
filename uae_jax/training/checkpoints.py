"""Orbax checkpoints of a stage: written asynchronously, resumable bit for bit, with separately readable parameters.

`checkpoints/<stage>/<step>/` contains `state` (trained parameters, optimizer state, moving average, key), `data` (the
position in the data), `config`, and `checksums`, with which a restore compares what it reads. The frozen parameters are
those that the stage started from, so they are not written. The final checkpoint of a stage contains `params`, the
whole tree, `config` and `checksums`. What is not finite is never saved.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
from pathlib import Path
import shutil
from typing import Any

from absl import logging
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from uae_jax import trees
from uae_jax.options import CheckpointOptions
from uae_jax.training import inspection, processes
from uae_jax.training.inspection import NonFiniteError
from uae_jax.training.state import State
from uae_jax.weights.checkpoint import read_tree

PARAMS, STATE, DATA, CONFIG, CHECKSUMS = "params", "state", "data", "config", "checksums"
DEFAULT_POLICY = CheckpointOptions()


class SaveError(OSError):
  """Raised when a checkpoint cannot be written, most often because the disk is full; earlier ones remain intact."""


def _score(policy: CheckpointOptions, metrics: Mapping) -> dict[str, float]:
  """Returns {name: value} of the metric that ranks a checkpoint; empty if checkpoints are not ranked.

  Raises:
    ValueError: the stage does not log the metric.
  """
  if not policy.best:
    return {}
  if policy.metric not in metrics:
    raise ValueError(f"config.checkpoints.metric = {policy.metric!r}: the stage logs only {', '.join(sorted(metrics))}")
  return {policy.metric: float(np.asarray(metrics[policy.metric]))}


def _manager_options(policy: CheckpointOptions) -> ocp.CheckpointManagerOptions:
  policies, options = [checkpoint_managers.LatestN(policy.last)], {}
  if policy.best:

    def value(metrics):
      return metrics[policy.metric]

    policies.append(checkpoint_managers.BestN(get_metric_fn=value, reverse=policy.mode == "min", n=policy.best))
    options = {"best_fn": value, "best_mode": policy.mode}
  return ocp.CheckpointManagerOptions(
    preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
    # Unfinished checkpoints of a killed run are useless and may fill the disk.
    cleanup_tmp_directories=True,
    **options,
  )


def _item_handlers() -> dict:
  """Writers of the items. Random mantissas hardly compress: zstd doubles the time of a save and saves 8% of float32."""
  arrays = {name: ocp.PyTreeCheckpointHandler(use_compression=False) for name in (PARAMS, STATE)}
  return arrays | {name: ocp.JsonCheckpointHandler() for name in (DATA, CONFIG, CHECKSUMS)}


def _writable(state: State) -> dict:
  """Returns the serializable part of a state, with PRNG keys as raw key data."""
  return {
    "step": state.step,
    "skipped": state.skipped,
    "loss_average": state.loss_average,
    "trainable": state.trainable,
    "opt_state": state.opt_state,
    "ema": state.ema,
    "rng": jax.random.key_data(state.rng),
    **({"old": state.old} if state.old else {}),
    **({"reference": state.reference} if state.reference else {}),
  }


def _abstract(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), tree)


def read_checksums(folder: Path) -> dict:
  """Reads the checksums of a step; empty for a step of a version that wrote none."""
  if not (folder / CHECKSUMS).exists():
    return {}
  return ocp.JsonCheckpointHandler().restore(folder / CHECKSUMS, args=ocp.args.JsonRestore())


def find_damage(tree: dict, data: dict | None, saved: Mapping) -> str:
  """Compares what was read with its checksums; returns what is wrong, "" if nothing is.

  Args:
    tree: state or parameters, as they were read.
    data: position in the data; None for parameters.
    saved: result of `read_checksums`.
  """
  leaves, is_finite = inspection.inspect(tree)
  if not is_finite:
    return "it has numbers that are not finite"
  if not saved:
    return ""
  if saved.get("data") != inspection.checksum_of_json(data):
    return "the position in the data does not have its checksum"
  wrong = [path for path, checksum in leaves.items() if saved.get("leaves", {}).get(path) != checksum]
  return f"{len(wrong)} arrays do not have their checksums, the first is {wrong[0]}" if wrong else ""


def read_params(folder: Path, abstract: Mapping) -> dict:
  """Reads all parameters of a finished stage in the shardings and dtypes of `abstract`, and compares their checksums.

  Args:
    folder: `checkpoints/<stage>/<step>/params` of a run, which may be of an earlier version.
    abstract: nested dict of `ShapeDtypeStruct`s with shardings.

  Raises:
    OtherModelError: the shapes on disk are those of another model.
    ValueError: the parameters are not those that were saved.
    Exception: the checkpoint is damaged, for which Orbax raises many exception types.
  """
  saved = read_checksums(folder.parent.absolute())
  if not saved:  # It was written by an earlier version.
    return read_tree(folder, abstract)
  stored = {
    path: leaf.dtype for path, leaf in trees.items(ocp.StandardCheckpointHandler().metadata(folder.absolute()).tree)
  }
  as_stored = trees.from_items(
    (path, jax.ShapeDtypeStruct(leaf.shape, stored.get(path, leaf.dtype), sharding=leaf.sharding))
    for path, leaf in trees.items(abstract)
  )
  params = read_tree(folder, as_stored)
  problem = find_damage(params, None, saved)
  if problem:
    raise ValueError(problem)
  return jax.tree.map(
    lambda x, wanted: x if x.dtype == wanted.dtype else x.astype(wanted.dtype), params, dict(abstract)
  )


class Checkpoints:
  """Checkpoints of one stage; every process must make the same calls.

  Args:
    directory: folder of the stage's checkpoints.
    policy: which checkpoints to keep.
    before_save: called before every save; may raise to prevent it.
  """

  def __init__(
    self,
    directory: Path,
    policy: CheckpointOptions = DEFAULT_POLICY,
    before_save: Callable[[], None] = lambda: None,
  ):
    self.directory = Path(directory).absolute()
    self._before_save = before_save
    self._policy = policy
    self._manager = ocp.CheckpointManager(
      self.directory, options=_manager_options(policy), item_handlers=_item_handlers()
    )

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # The exception for a full disk depends on the layer below Orbax that raises it.
      steps = ", ".join(map(str, sorted(self._manager.all_steps()))) or "none"
      reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
      raise SaveError(
        f"{self.directory}: a checkpoint could not be written ({reason}); steps on disk: {steps}. "
        "Make room and start the same command again"
      ) from error

  def save(self, step: int, state: State, data: dict, config: dict, metrics: Mapping | None = None) -> None:
    """Starts writing a state; returns as soon as the device arrays are copied.

    Args:
      step: number of steps done in this stage.
      state: state after `step` steps.
      data: position in the data, from `Batches.get_state`.
      config: plain config of the run.
      metrics: metrics of this step; required if the policy keeps the best checkpoints.

    Raises:
      NonFiniteError: parameters, averages or optimizer state are not finite; nothing is written.
      SaveError: this save or the previous one failed.
      ValueError: the metric that ranks checkpoints is not in `metrics`.
    """
    score = _score(self._policy, metrics or {}) or None
    tree = _writable(state)
    items = {
      STATE: ocp.args.PyTreeSave(tree),
      DATA: ocp.args.JsonSave(data),
      CONFIG: ocp.args.JsonSave(config),
      CHECKSUMS: ocp.args.JsonSave(self._checksums(step, tree, data)),
    }
    with self._writing():
      self._manager.save(step, args=ocp.args.Composite(**items), metrics=score, force=True)

  def save_final(self, step: int, params: dict, config: dict) -> None:
    """Writes all parameters of the finished stage and waits until they are on disk.

    Raises:
      NonFiniteError: a parameter is not finite; nothing is written.
      SaveError: this save or the previous one failed.
    """
    items = {
      PARAMS: ocp.args.PyTreeSave(params),
      CONFIG: ocp.args.JsonSave(config),
      CHECKSUMS: ocp.args.JsonSave(self._checksums(step, params)),
    }
    self.wait()
    with self._writing():
      if self._manager.latest_step() == step:
        self._manager.delete(step)
      self._manager.save(step, args=ocp.args.Composite(**items), force=True)
    self.wait()

  def _checksums(self, step: int, tree: dict, data: dict | None = None) -> dict:
    """Computes the content of `checksums`.

    Raises:
      NonFiniteError: the tree contains a number that is not finite.
    """
    self._before_save()
    leaves, is_finite = inspection.inspect(tree)
    if not is_finite:
      raise NonFiniteError(
        f"{self.directory}: parameters or optimizer state are not finite after step {step}, they are not saved; "
        f"{self.last_saved()}: {inspection.ADVICE}"
      )
    return {"leaves": leaves, "data": inspection.checksum_of_json(data)}

  def last_saved(self) -> str:
    """Names the newest state on disk, for messages."""
    self.wait()
    steps = self.steps()
    return f"the last good state is that of step {steps[0]}" if steps else "no state of this stage has been saved"

  def is_final(self, step: int) -> bool:
    return (self.directory / str(step) / PARAMS).exists()

  def steps(self) -> list[int]:
    """Lists the steps on disk, newest first."""
    return sorted(self._manager.all_steps(), reverse=True)

  def restore(self, state: State) -> tuple[State, dict] | None:
    """Restores (state, position in the data) from the newest readable checkpoint; None if there is none.

    A checkpoint that any process cannot read is reported in a warning and renamed to `<step>.damaged`; all processes
    then use the one before it.

    Args:
      state: first state of the stage; provides structure, shardings and frozen parameters.
    """
    target = _abstract(_writable(state))

    def read(folder: Path) -> tuple[dict, dict]:
      values = ocp.StandardCheckpointHandler().restore(folder / STATE, args=ocp.args.StandardRestore(target))
      return values, ocp.JsonCheckpointHandler().restore(folder / DATA, args=ocp.args.JsonRestore())

    for step in self.steps():
      found = None if self.is_final(step) else self._read(step, read)
      if found is not None:
        values, data = found
        rng = jax.random.wrap_key_data(values.pop("rng"))
        return dataclasses.replace(state, **values, rng=rng), data
    return None

  def restore_final(self, abstract_params: dict) -> dict | None:
    """Restores all parameters of a finished stage; None if it is not finished or its parameters are damaged.

    Args:
      abstract_params: `ShapeDtypeStruct`s with the shardings of the result.
    """

    def read(folder: Path) -> tuple[dict, None]:
      handler = ocp.StandardCheckpointHandler()
      return handler.restore(folder / PARAMS, args=ocp.args.StandardRestore(abstract_params)), None

    found = next((self._read(step, read) for step in self.steps() if self.is_final(step)), None)
    return None if found is None else found[0]

  def _read(self, step: int, read: Callable[[Path], tuple[dict, Any]]) -> tuple[dict, Any] | None:
    """Returns (tree, data) of a step, checked; if any process cannot read it, renames the folder and returns None.

    Uses Orbax's handlers directly: its managers synchronize all processes at the end of a read, which would deadlock if
    one process cannot read its part.
    """
    folder, problem, found, saved = self.directory / str(step), "", None, {}
    try:
      found, saved = read(folder), read_checksums(folder)
    except Exception as error:  # Orbax raises many exceptions for a damaged checkpoint; all are handled alike.
      problem = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    problem = next(filter(None, processes.gather(problem)), "")
    if not problem and found is not None:
      # All processes compute the checksums together, so this comes after all of them have read their parts.
      problem = find_damage(*found, saved)
      if not problem:
        return found
    aside = self.directory / f"{step}.damaged"
    logging.warning("checkpoint %s/%d cannot be read (%s): set aside as %s", self.directory, step, problem, aside)
    processes.on_first(lambda: self._set_aside(step, aside))
    self._manager.reload()
    return None

  def _set_aside(self, step: int, aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    (self.directory / str(step)).rename(aside)

  def wait(self) -> None:
    """Waits until all saves are on disk.

    Raises:
      SaveError: the last save failed.
    """
    with self._writing():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits until all saves are on disk and closes the manager.

    Raises:
      SaveError: the last save failed.
    """
    self.wait()
    self._manager.close()
