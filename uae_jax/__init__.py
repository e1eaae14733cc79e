"""UAE in JAX: image autoencoders whose latent is text. `UAE.load(path)`; `embedders.load(kind, path)`."""

import importlib

__all__ = ["UAE", "embedders"]


def __getattr__(name: str):
  """Imports the public names on first access, so that `import uae_jax` does not import JAX."""
  if name == "UAE":
    return importlib.import_module("uae_jax.api").UAE
  if name == "embedders":
    return importlib.import_module("uae_jax.embedders")
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
