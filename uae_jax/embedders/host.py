"""Embedders for images on the host, loaded from published files."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from pathlib import Path
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
from tqdm import tqdm

from uae_jax import cloud_storage, sharding
from uae_jax.data.images import ImageSource
from uae_jax.data.preprocessing import Preprocessing
from uae_jax.embedders import registry
from uae_jax.embedders.in_graph import EmbeddingNetwork
from uae_jax.embedders.kind import EmbedderSizes
from uae_jax.files import input_path
from uae_jax.weights import table


@dataclasses.dataclass(frozen=True, eq=False)
class Embedder:
  """A loaded embedder with the preprocessing of its benchmark.

  Attributes:
    network: the model as a pure function of `params`.
    params: nested dict of arrays.
    sizes: sizes that `network` was built from.
    preprocessing: maps images to normalized pixels, on the host.
    batch_size: images per call of the model; fewer images use the next power of two.
  """

  network: EmbeddingNetwork
  params: dict[str, Any]
  sizes: EmbedderSizes
  preprocessing: Preprocessing
  batch_size: int = 16

  def embed(self, images: Sequence[ImageSource], *, progress: bool = False) -> np.ndarray:
    """Embeds images.

    Args:
      images: PIL images, paths, or uint8[H, W, 3] arrays, of any sizes.
      progress: show a progress bar.

    Returns:
      float32[B, E], rows of norm 1.

    Raises:
      ValueError: an image cannot be read, or `images` is empty.
    """
    if not images:
      raise ValueError("no images to embed")
    size = min(self.batch_size, 1 << (len(images) - 1).bit_length())
    rows = []
    for start in tqdm(range(0, len(images), size), desc=self.network.kind, unit="batch", disable=not progress):
      pixels = self.preprocessing.batch(images[start : start + size])
      padded = np.zeros((size, *pixels.shape[1:]), np.float32)
      padded[: len(pixels)] = pixels
      rows.append(np.asarray(self._embed_pixels(self.params, padded))[: len(pixels)])
    return np.concatenate(rows)

  @functools.cached_property
  def _embed_pixels(self) -> Callable:
    return jax.jit(self.network.embed_pixels)


def load(kind: str, path: str | Path, dtype: str = "float32", mesh: Mesh | None = None) -> Embedder:
  """Loads an embedder from its published files; see `uae_jax.embedders.load`."""
  mesh = mesh or sharding.make_mesh(devices=jax.local_devices()[:1])
  path = Path(cloud_storage.fetched(input_path(path)))
  definition = registry.find(kind)
  if not path.exists():
    raise ValueError(f"{path}: no such file or folder ({kind} embedder)")
  checkpoint = definition.open(path)
  height, width = checkpoint.preprocessing.output_size
  if height != width:
    raise ValueError(f"{path}: the preprocessing gives {height} x {width} pixels, expected a square")
  sizes = EmbedderSizes(kind, checkpoint.network, height, checkpoint.preprocessing.mean, checkpoint.preprocessing.std)

  # An abstract model, so nothing is initialized.
  graphdef, abstract = sharding.abstract_model(lambda: sizes.build(nnx.Rngs(0)), mesh)
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=x.sharding), abstract)
  params = table.load(checkpoint.tensors, checkpoint.table, abstract, ignored=checkpoint.ignored, source=str(path))
  params = jax.tree.map(lambda x, want: jax.device_put(x, want.sharding), params, abstract)
  network = EmbeddingNetwork(kind, graphdef, height, sizes.mean, sizes.std)
  return Embedder(network, params, sizes, checkpoint.preprocessing)
