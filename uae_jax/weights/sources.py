"""Loads a UAE from a folder of weights, in the native layout (`uae-jax convert --to orbax`) or the official one."""

from pathlib import Path

from jax.sharding import Mesh

from uae_jax.models.uae import UAEConfig
from uae_jax.weights import native, official
from uae_jax.weights.checkpoint import LoadedUAE


def read(path: Path, dtype: str, mesh: Mesh) -> LoadedUAE:
  """Reads either layout; see `native.load` and `official.load_official` for arguments and errors."""
  return native.load(path, dtype, mesh) if native.is_native(path) else official.load_official(path, dtype, mesh)


def config(path: Path) -> UAEConfig:
  """Reads the architecture of a folder in either layout, without its tensors.

  Raises:
    weights.table.WeightError: parts or settings are missing or wrong.
  """
  if native.is_native(path):
    return native.config(path)
  reader = official.Reader(official.Folders(path))
  reader.check()
  return reader.config


def processor_folder(path: Path) -> Path:
  """The folder of the processor's files, in either layout."""
  return path / native.PROCESSOR if native.is_native(path) else official.Folders(path).language
