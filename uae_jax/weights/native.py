"""The native checkpoint of a UAE: `uae.json`, `processor/`, and `params/` by Orbax, which restores onto any mesh."""

import json
from pathlib import Path

from flax import nnx
import jax.numpy as jnp
from jax.sharding import Mesh
import orbax.checkpoint as ocp

from uae_jax import json_files, sharding, trees
from uae_jax.data import processors
from uae_jax.models.system import SystemConfig, nets_of
from uae_jax.models.systems import KINDS
from uae_jax.plain import from_plain, to_plain
from uae_jax.weights import legacy
from uae_jax.weights.checkpoint import InferenceSettings, LoadedUAE, OtherModelError, damage, read_tree, typed
from uae_jax.weights.export import copy_processor
from uae_jax.weights.finite import WHAT, finite_rows
from uae_jax.weights.official import EXTRAS

PARAMS, PROCESSOR = "params", "processor"


def is_native(folder: Path) -> bool:
  return (folder / EXTRAS).exists() and (folder / PARAMS).is_dir()


def save(target: Path, loaded: LoadedUAE) -> None:
  """Writes a native checkpoint.

  Args:
    target: an empty folder.
    loaded: the UAE; embedders in its parameters are not saved.
  """
  params = nets_of(loaded.params)
  content = {
    "format": legacy.EXPORT_FORMAT,
    "config": KINDS.to_plain(loaded.config),
    "settings": to_plain(loaded.inference),
    "dtypes": {path: jnp.dtype(leaf.dtype).name for path, leaf in trees.items(params)},
  }
  copy_processor(loaded.processor_folder, target / PROCESSOR)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save((target / PARAMS).absolute(), params)
  (target / EXTRAS).write_text(json.dumps(content, indent=2) + "\n")


def config(source: Path) -> SystemConfig:
  """Reads the architecture of a native checkpoint.

  Raises:
    ValueError: the checkpoint has another format.
  """
  file = source / EXTRAS
  content = legacy.current_export(json_files.read_object(file), file)
  return KINDS.from_plain(content["config"], f"{file}: config")


def load(source: Path, dtype: str, mesh: Mesh) -> LoadedUAE:
  """Reads a native checkpoint.

  Args:
    source: folder written by `save`.
    dtype: dtype of the parameters: "bfloat16", "float32", or "auto" for the saved one. Adapters and constants always
      keep the saved dtype.
    mesh: mesh that the parameters are sharded over; any mesh works.

  Raises:
    ValueError: the checkpoint has another format, or is damaged.
  """
  file = source / EXTRAS
  content = legacy.current_export(json_files.read_object(file), file)
  config = KINDS.from_plain(content["config"], f"{file}: config")
  inference = from_plain(InferenceSettings, content["settings"], f"{file}: settings")
  graphdef, abstract = sharding.abstract_model(lambda: config.build(nnx.Rngs(0)), mesh)
  abstract = typed(abstract, dtype, stored=content["dtypes"])
  try:
    params = read_tree(source / PARAMS, abstract)
  except OtherModelError:
    raise
  except Exception as error:  # Orbax raises many exception types for a damaged checkpoint.
    raise ValueError(f"{source / PARAMS}: the checkpoint cannot be read ({damage(error)})") from error
  bad = [path for path, rows in finite_rows(dict(trees.items(params))).items() if not rows.all()]
  if bad:
    raise ValueError(f"{source / PARAMS}: {bad[0]} {WHAT}, {len(bad)} such parameters in all: export it again")
  folder = source / PROCESSOR
  return LoadedUAE(config, graphdef, params, processors.read(folder), folder, inference)
