"""UAE in JAX: auto-embedders of images whose latent is text. `UAE.load(path)`; `embedders.load(kind, path)`."""

import importlib

__all__ = ["UAE", "embedders"]


def __getattr__(name: str):
  """The public names, imported when they are first asked for: `import uae_jax` brings no JAX."""
  if name == "UAE":
    return importlib.import_module("uae_jax.api").UAE
  if name == "embedders":
    return importlib.import_module("uae_jax.embedders")
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
