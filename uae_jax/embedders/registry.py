"""The kinds of embedders, one row per kind; each is imported on first use, so this file does not import JAX."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from uae_jax.embedders.kind import Kind

# Kind -> module that defines it as `KIND`.
MODULES = {
  "clip": "uae_jax.embedders.clip",
  "longclip": "uae_jax.embedders.longclip",
  "dinov2": "uae_jax.embedders.dinov2",
  "dinov3": "uae_jax.embedders.dinov3",
  "siglip2": "uae_jax.embedders.siglip2",
  "pickscore": "uae_jax.embedders.pickscore",
  "hpsv2": "uae_jax.embedders.hpsv2",
}
KINDS = tuple(MODULES)


def find(kind: str) -> "Kind":
  """Returns the definition of a kind.

  Raises:
    ValueError: the kind is unknown.
  """
  if kind not in MODULES:
    raise ValueError(f"embedder kind {kind!r} is not known; expected one of {', '.join(KINDS)}")
  return importlib.import_module(MODULES[kind]).KIND
