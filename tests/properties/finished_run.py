"""The workdir of a run whose last two stages are finished, made without training."""

import json
from pathlib import Path

import jax
import numpy as np

from uae_jax import sharding
from uae_jax.commands.config_file import load_config
from uae_jax.options import read_config
from uae_jax.training import initial
from uae_jax.training.build import build
from uae_jax.training.checkpoints import Checkpoints
from uae_jax.training.workdir import open_workdir

CONFIGS = Path(__file__).parents[2] / "configs"
STAGES = ("cold_start", "understanding_for_generation")


def smoke_config():
  return read_config(load_config(f"{CONFIGS / 'scenes.py'}:smoke"))


def write(workdir: Path, config) -> tuple[dict, dict]:
  """Writes the workdir; returns the parameters after each of `STAGES`."""
  plain = open_workdir(workdir, config)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  start = initial.read(config, mesh, workdir)
  built = build(config, start.sizes, start.processor, mesh)
  rng = np.random.default_rng(0)
  before = jax.tree.map(
    lambda leaf: jax.device_put(0.1 * rng.normal(size=leaf.shape).astype(np.float32)), built.abstract_params
  )
  after = jax.tree.map(lambda leaf: leaf + 0.01, before)
  for stage, params in zip(STAGES, (before, after), strict=True):
    save_stage(workdir / "checkpoints" / stage, params, plain)
  return before, after


def save_stage(folder: Path, params: dict, plain: dict) -> None:
  checkpoints = Checkpoints(folder)
  checkpoints.save_final(2, params, plain)
  checkpoints.close()


def edit_json(file: Path, change) -> None:
  """Replaces the content of a JSON file with `change(content)`."""
  file.write_text(json.dumps(change(json.loads(file.read_text()))))
