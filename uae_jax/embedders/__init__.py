"""Image embedders, the rewards and metrics of UAE; `KINDS` lists them.

`load(kind, path).embed(images)` is the benchmark: pictures of any size, preprocessed on the host as its library does.
`in_graph.EmbeddingNetwork` is the same network inside a jitted step: images on the device, resized by a differentiable
bicubic. A new kind is one file in this folder and one row in `registry.py`. Importing this package imports no JAX.
"""

from typing import TYPE_CHECKING

from uae_jax.embedders.registry import KINDS

if TYPE_CHECKING:
  from pathlib import Path

  from jax.sharding import Mesh

  from uae_jax.embedders.host import Embedder

__all__ = ["KINDS", "load"]


def load(kind: str, path: "str | Path", dtype: str = "float32", mesh: "Mesh | None" = None) -> "Embedder":
  """An embedder from its published files.

  Args:
    kind: one of `KINDS`.
    path: a Hugging Face folder (`config.json`, `preprocessor_config.json`, safetensors); for longclip a `.pt` or
      `.safetensors` file in the layout of OpenAI's CLIP, or a folder with one of them.
    dtype: of the parameters and the computation.
    mesh: where the parameters live; one device by default.

  Raises:
    ValueError: the kind is unknown, or the files are missing, torn or of another network.
  """
  from uae_jax.embedders import host

  return host.load(kind, path, dtype, mesh)
