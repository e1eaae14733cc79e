"""Image embedders, used by UAE for rewards and metrics; `KINDS` lists them.

`load(kind, path).embed(images)` is for benchmarks: images of any size, preprocessed on the host as in the original
library. `in_graph.EmbeddingNetwork` is the same model inside a jitted step: images on the device, resized by a
differentiable bicubic filter. To add a kind, write one file in this folder and add one row to `registry.py`. Importing
this package does not import JAX.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from uae_jax.embedders.registry import KINDS

if TYPE_CHECKING:
  from jax.sharding import Mesh

  from uae_jax.embedders.host import Embedder

__all__ = ["KINDS", "load"]


def load(kind: str, path: str | Path, dtype: str = "float32", mesh: "Mesh | None" = None) -> "Embedder":
  """Loads an embedder from its published files.

  Args:
    kind: one of `KINDS`.
    path: a Hugging Face folder (`config.json`, `preprocessor_config.json`, safetensors); for longclip and hpsv2 a
      `.pt` or `.safetensors` file in the layout of OpenAI's CLIP, or a folder with one such file.
    dtype: dtype of the parameters and the computation.
    mesh: mesh that the parameters are sharded over; default: one device.

  Raises:
    ValueError: the kind is unknown, or the files are missing, corrupt or belong to another model.
  """
  from uae_jax.embedders import host

  return host.load(kind, path, dtype, mesh)
