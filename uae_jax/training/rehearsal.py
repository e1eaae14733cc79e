"""Builds every stage of a config without allocating a parameter: mistakes are reported before anything is loaded."""

from pathlib import Path
import tempfile

import jax
from jax.sharding import Mesh

from uae_jax import cloud_storage
from uae_jax.data.pipeline import make_dataset
from uae_jax.data.sources import HELD_OUT, open_source
from uae_jax.embedders import registry
from uae_jax.files import is_in_cloud
from uae_jax.options import FRESH, Experiment
from uae_jax.training import frozen_weights, initial
from uae_jax.training.build import Built, build
from uae_jax.training.sizes import Sizes
from uae_jax.training.stage import make_init, make_phases, stage_optimizer, supervised_step
from uae_jax.training.stages import spec


def rehearse(config: Experiment, mesh: Mesh) -> tuple[Sizes, Built]:
  """Opens the data, and builds networks, objectives, samplers and optimizers of every stage of a config.

  Args:
    config: config of the run, valid by itself.
    mesh: mesh of the run.

  Returns:
    (sizes, networks); the sizes of embedders with weights are those of the published ones.

  Raises:
    ValueError: a path, the data or a stage is wrong; the message names the field.
  """
  check_paths(config)
  with tempfile.TemporaryDirectory() as folder:
    sizes, processor = initial.read_sizes(config, Path(folder) / "processor")
    built = build(config, sizes, processor, mesh)
  check_batches(config, processor)
  for name in config.stages:
    check_stage(config, name, built)
  return sizes, built


def check_paths(config: Experiment) -> None:
  """Checks that the folders of embedders and of another run's stage exist.

  Raises:
    ValueError: one does not exist; the message names its field.
  """
  for kind, source in config.embedders.items():
    if source in ("", FRESH):
      continue
    if not (cloud_storage.exists(source) if is_in_cloud(source) else Path(source).exists()):
      raise ValueError(f"config.embedders.{kind} = {source!r}: no such file or folder")
    if not is_in_cloud(source):
      try:
        registry.find(kind).open(Path(source))
      except (ValueError, OSError) as error:
        raise ValueError(f"config.embedders.{kind} = {source!r}: {error}") from error
  if config.init.checkpoint:
    initial.find_checkpoint(config.init.checkpoint)


def check_batches(config: Experiment, processor) -> None:
  """Reads a batch of two records per kind of captions, and counts the held-out records.

  Raises:
    ValueError: there is no data, too few held-out records, or the captions of a stage cannot be made.
  """
  source = open_source(config.data, "train")
  if not len(source):
    raise ValueError(f"config.data.source = {config.data.source!r}: no records")
  for captions in sorted({config.section(name).captions for name in config.stages}):
    dataset = make_dataset(source, config.data, processor, captions=captions, batch_size=2, seed=0, num_threads=0)
    next(iter(dataset))
  wanted = config.evaluation.num_images
  if wanted and len(held_out := open_source(config.data, HELD_OUT)) < wanted:
    raise ValueError(
      f"config.evaluation.num_images = {wanted}, but split {HELD_OUT} of data.source = {config.data.source} has "
      f"{len(held_out)} records: lower num_images or add records"
    )


def check_stage(config: Experiment, name: str, built: Built) -> None:
  """Builds the step and the abstract first state of a stage.

  Raises:
    ValueError: a setting of the stage is wrong, or it trains no parameter; the message names the stage.
  """
  section, stage, key = config.section(name), spec.find(name), jax.random.key(0)
  try:
    optimizer, _, _ = stage_optimizer(section)
    params = built.abstract_params
    if stage.extra_params is not None:
      extra_params = stage.extra_params
      params = params | jax.eval_shape(lambda key: extra_params(built, key), key)
    phases = None
    if stage.make_phases is None:
      supervised_step(config, name, built, optimizer)
    else:
      phases = make_phases(config, name, built, optimizer)
    jax.eval_shape(make_init(section, built, optimizer, phases), frozen_weights.abstract(section, params), key)
  except ValueError as error:
    message = str(error)
    raise ValueError(message if message.startswith("config.") else f"config.{name}: {message}") from error
