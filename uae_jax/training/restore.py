"""The result of a run, ready to use: the newest finished stage as constructor arguments of `api.UAE`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
import warnings

from jax.sharding import Mesh
import ml_collections
import orbax.checkpoint as ocp

from uae_jax import trees
from uae_jax.data.processing import Processor
from uae_jax.models.uae import NETS
from uae_jax.training import sizes
from uae_jax.training.build import build, typed
from uae_jax.training.checkpoints import PARAMS
from uae_jax.training.order import stage_runs
from uae_jax.training.workdir import read_config

# A run's own copy of its tokenizer and image processor.
PROCESSOR = "processor"


def load_run(workdir: str | Path, dtype: str, mesh: Mesh) -> dict[str, Any]:
  """Constructor arguments of `api.UAE` from the workdir of `uae-jax train`.

  Args:
    workdir: with `config.json`, `model.json`, `processor/` and `checkpoints/`.
    dtype: of the parameters: "bfloat16", "float32", or "auto" for that of the checkpoint. Adapters and stored constants
      stay as they are.
    mesh: where the parameters live.

  Raises:
    FileNotFoundError: not a workdir.
    ValueError: no stage of the run is finished, or the config or every finished checkpoint is damaged.
  """
  workdir = Path(workdir)
  config = ml_collections.ConfigDict(read_config(workdir))
  try:
    folders = [folder for folder, _ in stage_runs(config)]
    evaluation, processor = config.evaluation, Processor.from_folder(workdir / PROCESSOR)
    built = build(config, sizes.read(workdir), processor, mesh)
  except (AttributeError, KeyError) as error:
    raise ValueError(f"{workdir}/config.json is not the config of a run of uae-jax: {error}") from error
  finished = [step for folder in reversed(folders) for step in finished_steps(workdir / "checkpoints" / folder)]
  if not finished:
    raise ValueError(
      f"{workdir}: no stage of this run is finished (checkpoints/<stage>/<step>/params): "
      f"run uae-jax train --workdir={workdir} to its end first"
    )
  if finished[0].parent.parent.name != folders[-1]:
    warnings.warn(
      f"{workdir}: the run is not finished; using what {finished[0].parent.parent.name} left, before {folders[-1]}",
      stacklevel=3,
    )
  return {
    "graphdef": built.networks.graphdef,
    "params": read_params(finished, typed(built.abstract_params, dtype, built.buffers)),
    "processor": processor,
    "text_tower": evaluation.text_tower,
    "is_small_world": config.model == sizes.SMALL_WORLD,
    "resolution_px": config.data.image_px,
    "guidance": evaluation.guidance,
    "steps": evaluation.sampler_steps,
    "max_new_tokens": evaluation.max_new_tokens,
    "shift": evaluation.shift,
  }


def finished_steps(stage: Path) -> list[Path]:
  """The `params` folders of a stage's checkpoints, newest first; steps that were never committed are left out."""
  steps = [step for step in stage.glob("*") if step.name.isdigit() and (step / PARAMS).is_dir()]
  return [step / PARAMS for step in sorted(steps, key=lambda step: int(step.name), reverse=True)]


class OtherModelError(ValueError):
  """A checkpoint is whole, but of a model of other sizes."""


def check_shapes(path: Path, stored: Mapping, abstract: Mapping) -> None:
  """Compares the shapes on disk with those of the model.

  Raises:
    OtherModelError: they differ.
  """
  found = {name: tuple(leaf.shape) for name, leaf in trees.items(stored)}
  wanted = {name: tuple(leaf.shape) for name, leaf in trees.items(abstract)}
  different = [name for name in sorted(found | wanted) if found.get(name) != wanted.get(name)]
  if different:
    first = different[0]
    raise OtherModelError(
      f"{path} holds another model than its model.json describes: {len(different)} "
      f"parameters differ, the first is {first}: {found.get(first, 'absent')} on disk, "
      f"{wanted.get(first, 'absent')} in the model"
    )


def read_params(candidates: list[Path], abstract: Mapping) -> dict:
  """The nets of the first readable candidate, placed as `abstract` says.

  A torn or damaged one is named in a warning, and the next is tried.

  Raises:
    ValueError: none can be read, or one holds a model of other sizes.
  """
  errors = []
  for path in candidates:
    try:
      with ocp.StandardCheckpointer() as checkpointer:
        check_shapes(path, ocp.StandardCheckpointHandler().metadata(path.absolute()).tree, abstract)
        params = checkpointer.restore(path.absolute(), abstract)
    except OtherModelError:
      raise
    except Exception as error:  # Orbax raises many kinds for a damaged checkpoint; all mean the same here.
      errors.append(f"{path} ({type(error).__name__}: {' '.join(str(error).split())[:200]})")
      warnings.warn(f"checkpoint cannot be read, trying the one before: {errors[-1]}", stacklevel=4)
      continue
    return {net: params[net] for net in NETS}
  raise ValueError(f"no finished checkpoint can be read: {'; '.join(errors)}")
