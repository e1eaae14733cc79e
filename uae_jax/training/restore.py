"""Loads a UAE for inference from any source; from a run, the result of its newest finished stage."""

from collections.abc import Mapping
import functools
import os
from pathlib import Path
import warnings

import jax
from jax.sharding import Mesh

from uae_jax import cloud_storage, embedders, sharding
from uae_jax.data import processor_files, processors
from uae_jax.data.preprocessing import Preprocessing
from uae_jax.embedders.host import Embedder
from uae_jax.files import input_path
from uae_jax.models.system import nets_of
from uae_jax.options import Experiment
from uae_jax.plain import from_plain
from uae_jax.training import checkpoints, sizes
from uae_jax.training.build import Built, build
from uae_jax.training.checkpoints import PARAMS
from uae_jax.training.workdir import read_config
from uae_jax.weights import legacy, sources
from uae_jax.weights.checkpoint import InferenceSettings, LoadedUAE, OtherModelError, damage, typed

DTYPES = ("bfloat16", "float32", "auto")

# Folder in a workdir with the run's copy of its tokenizer and image processor.
PROCESSOR = "processor"


def read(path: str | os.PathLike, dtype: str, mesh: Mesh) -> LoadedUAE:
  """Reads a UAE from any source: a run, an export of `uae-jax convert`, or the official folder layout.

  A run is its workdir, or `checkpoints/<stage>` or `checkpoints/<stage>/<step>` in it for the result of that stage.

  Args:
    path: folder of the source; one in a bucket is copied to this machine.
    dtype: dtype of the parameters, one of `DTYPES`; "auto" for that of the files.
    mesh: mesh over which the parameters are sharded.

  Raises:
    FileNotFoundError: the folder does not exist or is none of these sources.
    ValueError: the dtype is unknown, or the source is damaged.
    weights.table.WeightError: tensors are missing, unexpected or have a wrong shape.
  """
  path = Path(cloud_storage.fetched(path))
  if dtype not in DTYPES:
    raise ValueError(f"dtype = {dtype!r}: expected one of {', '.join(DTYPES)}")
  if not path.is_dir():
    raise FileNotFoundError(f"{path}: no such folder")
  if is_run(path):
    return load_run(path, dtype, mesh)
  absolute = path.absolute()
  for folder in (absolute, absolute.parent):
    if folder.parent.name == "checkpoints" and is_run(workdir := folder.parent.parent):
      return load_run(workdir, dtype, mesh, checkpoint=absolute)
  return sources.read(path, dtype, mesh)


def is_run(path: Path) -> bool:
  return (path / "config.json").exists() and (path / "checkpoints").exists()


def load_run(workdir: str | Path, dtype: str, mesh: Mesh, checkpoint: Path | None = None) -> LoadedUAE:
  """Reads the result of the newest finished stage of a run, which may be of an earlier version.

  Args:
    workdir: folder of `uae-jax train`, with `config.json`, `model.json`, `processor/` and `checkpoints/`.
    dtype: dtype of the parameters: "bfloat16", "float32", or "auto" for that of the checkpoint. Adapters and stored
      constants keep theirs.
    mesh: mesh over which the parameters are sharded.
    checkpoint: absolute path of `checkpoints/<stage>` or `checkpoints/<stage>/<step>`, for the result of that stage.

  Raises:
    FileNotFoundError: the folder is not a workdir.
    ValueError: no stage of the run is finished, or the config or every finished checkpoint is damaged.
  """
  workdir = Path(workdir)
  config, built, model_sizes, finished = _open(workdir, mesh, checkpoint)
  params = read_params(finished, typed(built.abstract_params, dtype, exact=built.buffers))
  return of_run(workdir, config, built, model_sizes, nets_of(params))


def load_embedder(kind: str, path: str | Path, dtype: str = "float32") -> Embedder:
  """Loads an embedder on one device from its published files, or from the workdir of a run that trained one.

  Raises as `embedders.load` and `embedder`.
  """
  folder = Path(cloud_storage.fetched(input_path(path)))
  return embedder(folder, kind, dtype) if is_run(folder) else embedders.load(kind, folder, dtype=dtype)


def embedder(workdir: Path, kind: str, dtype: str = "float32", mesh: Mesh | None = None) -> Embedder:
  """Reads an embedder that a run trained, as its newest finished stage left it.

  Args:
    workdir: folder of the run.
    kind: one of the run's embedders.
    dtype: dtype of the parameters and the computation.
    mesh: mesh that the parameters are sharded over; default: one device.

  Raises:
    ValueError: the run has no embedder of this kind, or see `load_run`.
  """
  mesh = mesh or sharding.make_mesh(devices=jax.local_devices()[:1])
  _, built, model_sizes, finished = _open(workdir, mesh)
  if kind not in built.networks.embedders:
    raise ValueError(
      f"{workdir}: the run has no embedder {kind}; it has {', '.join(built.networks.embedders) or 'none'}"
    )
  params = read_params(finished, typed(built.abstract_params, dtype, exact=built.buffers))
  network, side = built.networks.embedders[kind], (built.networks.embedders[kind].image_px,) * 2
  # As in the run, images are stretched to the embedder's square.
  preprocessing = Preprocessing(side, None, mean=network.mean, std=network.std)
  return Embedder(network, params["embedders"][kind], model_sizes.embedders[kind], preprocessing)


def _open(
  workdir: Path, mesh: Mesh, checkpoint: Path | None = None
) -> tuple[Experiment, Built, sizes.Sizes, list[Path]]:
  """Config, networks and their sizes, and the parameters of finished stages, newest first; raises as `load_run`."""
  config = run_config(workdir)
  try:
    folders = [folder for folder, _ in config.runs]
    processor = processors.read(workdir / PROCESSOR)
    model_sizes = sizes.read(workdir)
    built = build(config, model_sizes, processor, mesh)
  except (AttributeError, KeyError) as error:
    raise ValueError(f"{workdir}/config.json is not the config of a run of uae-jax: {error}") from error
  folder_of = functools.partial(legacy.stage_folder, workdir / "checkpoints")
  finished = [step for folder in reversed(folders) for step in finished_steps(folder_of(folder))]
  if not finished:
    raise ValueError(
      f"{workdir}: no stage of this run is finished (checkpoints/<stage>/<step>/params): "
      f"run uae-jax train --workdir={workdir} to its end first"
    )
  if checkpoint is not None:
    finished = [step for step in finished if checkpoint in step.absolute().parents]
    if not finished:
      raise ValueError(f"{checkpoint}: this stage is not finished (no <step>/params in it)")
  elif finished[0].parent.parent.name != folder_of(folders[-1]).name:
    warnings.warn(
      f"{workdir}: the run is not finished; using what {finished[0].parent.parent.name} left, before {folders[-1]}",
      stacklevel=4,
    )
  return config, built, model_sizes, finished


def of_run(workdir: Path, config: Experiment, built: Built, model_sizes: sizes.Sizes, params: dict) -> LoadedUAE:
  """The UAE of a run with the inference settings of its evaluation.

  Args:
    workdir: folder of the run, with `processor/`.
    config: its config.
    built: its networks.
    model_sizes: their sizes.
    params: parameters, one entry per part, see `models.system.NETS`.
  """
  is_small_world, evaluation = sizes.find(config.model).trains_from_scratch, config.evaluation
  # A small-world model is trained on the distribution of all tokens, and its processor says nothing.
  uae, side = model_sizes.uae, config.data.image_px
  is_by_token = uae.generates_by_captioner
  kept = {} if is_small_world else processor_files.kept_tokens(workdir / PROCESSOR)
  return LoadedUAE(
    config=model_sizes.uae,
    graphdef=built.networks.graphdef,
    params=params,
    processor=built.processor,
    processor_folder=workdir / PROCESSOR,
    inference=InferenceSettings(
      text_tower=evaluation.text_tower,
      is_small_world=is_small_world,
      resolution_px=side,
      guidance=evaluation.guidance,
      guidance_interval=evaluation.guidance_interval,
      steps=uae.decoder_tokens(side, side) if is_by_token else evaluation.sampler_steps,
      sampler="tokens" if is_by_token else "euler",
      max_new_tokens=evaluation.max_new_tokens,
      shift=1.0 if is_by_token else evaluation.shift_at(uae.latents_shape(side, side)),
      repetition_penalty=processor_files.repetition_penalty(
        workdir / PROCESSOR, others=("guidance_scale",) if is_by_token else ()
      ),
      **kept,
    ),
  )


def run_config(workdir: Path) -> Experiment:
  """Reads the config of a run, which may be of an earlier version.

  Raises:
    FileNotFoundError: the folder holds no run.
    ValueError: its config cannot be read.
  """
  plain = legacy.current_config(read_config(workdir))
  version = plain.pop("config_version")
  if version != legacy.CONFIG_VERSION:
    raise ValueError(f"{workdir}/config.json has config_version {version}, expected {legacy.CONFIG_VERSION}")
  try:
    return from_plain(Experiment, plain, "config")
  except ValueError as error:
    raise ValueError(f"{workdir}/config.json is not the config of a run of uae-jax: {error}") from error


def finished_steps(stage: Path) -> list[Path]:
  """Lists the `params` folders of a stage's checkpoints, newest first, without unfinished checkpoints."""
  steps = [step for step in stage.glob("*") if step.name.isdigit() and (step / PARAMS).is_dir()]
  return [step / PARAMS for step in sorted(steps, key=lambda step: int(step.name), reverse=True)]


def read_params(candidates: list[Path], abstract: Mapping) -> dict:
  """Reads the parameters from the first readable candidate, sharded like `abstract`.

  A warning names damaged candidates before it, and the one that is used instead.

  Raises:
    ValueError: no candidate can be read, or one has a model of other sizes.
  """
  errors = []
  for path in candidates:
    try:
      params = checkpoints.read_params(path, abstract)
    except OtherModelError:
      raise
    except Exception as error:  # Orbax raises many exceptions for a damaged checkpoint; all are handled alike.
      errors.append(f"{path} ({damage(error)})")
      continue
    if errors:
      warnings.warn(f"{'; '.join(errors)} cannot be read: using {path.parent} instead", stacklevel=4)
    return params
  raise ValueError(f"no finished checkpoint can be read: {'; '.join(errors)}")
