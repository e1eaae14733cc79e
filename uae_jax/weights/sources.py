"""Loads a system from a folder of weights: the native layout (`uae-jax convert --to orbax`), a UAE's, or a Janus'."""

from collections.abc import Callable
from pathlib import Path

from jax.sharding import Mesh

from uae_jax.models.janus.system import JanusSystemConfig
from uae_jax.models.system import SystemConfig
from uae_jax.models.uae import UAEConfig
from uae_jax.weights import export, janus_folder, native, official
from uae_jax.weights.checkpoint import LoadedUAE

# Class of the config -> writer of a folder for PyTorch, with the arguments of `export.write_uae`.
WRITERS: dict[type, Callable[..., None]] = {UAEConfig: export.write_uae, JanusSystemConfig: janus_folder.write}


def read(path: Path, dtype: str, mesh: Mesh) -> LoadedUAE:
  """Reads any layout; see `native.load`, `janus_folder.load` and `official.load_official` for arguments and errors."""
  if native.is_native(path):
    return native.load(path, dtype, mesh)
  if janus_folder.is_janus(path):
    return janus_folder.load(path, dtype, mesh)
  return official.load_official(path, dtype, mesh)


def config(path: Path) -> SystemConfig:
  """Reads the architecture of a folder in any layout, without its tensors.

  Raises:
    weights.table.WeightError: parts or settings are missing or wrong.
  """
  if native.is_native(path):
    return native.config(path)
  if janus_folder.is_janus(path):
    return janus_folder.read_config(path)
  reader = official.Reader(official.Folders(path))
  reader.check()
  return reader.config


def processor_folder(path: Path) -> Path:
  """The folder of the processor's files, in any layout."""
  if native.is_native(path):
    return path / native.PROCESSOR
  return path if janus_folder.is_janus(path) else official.Folders(path).language
