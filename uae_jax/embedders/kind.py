"""What defines a kind of embedder, and the sizes of one."""

from collections.abc import Callable, Mapping
import dataclasses
from pathlib import Path
from typing import Any

from flax import nnx

from uae_jax.data.preprocessing import Preprocessing
from uae_jax.embedders import registry
from uae_jax.models.vit import ViTConfig
from uae_jax.weights.table import Row


@dataclasses.dataclass(frozen=True)
class EmbedderSizes:
  """An embedder without weights.

  Attributes:
    kind: one of `registry.KINDS`.
    network: config of the network.
    image_px: side of the square that the network sees.
    mean: of the channels in 0..1.
    std: of the channels in 0..1.
  """

  kind: str
  network: ViTConfig
  image_px: int
  mean: tuple[float, float, float]
  std: tuple[float, float, float]

  def build(self, rngs: nnx.Rngs) -> nnx.Module:
    """The network with random parameters."""
    return registry.find(self.kind).network(self.network, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """Published files of an embedder, opened.

  Attributes:
    network: config of the network.
    tensors: name -> array, read lazily.
    table: rows for every parameter of the network.
    ignored: regular expression -> the reason why tensors of that name are not read.
    preprocessing: from pictures to pixels.
  """

  network: ViTConfig
  tensors: Mapping[str, Any]
  table: tuple[Row, ...]
  ignored: Mapping[str, str]
  preprocessing: Preprocessing


@dataclasses.dataclass(frozen=True)
class Kind:
  """Everything about a kind of embedder.

  Attributes:
    network: class of the network, called as `network(config, rngs=rngs)`; maps normalized pixels float[B, H, W, 3] to
      features float[B, E].
    config: class of the network's config.
    open: path -> its checkpoint; raises `ValueError` naming the file.
    published: name of a published checkpoint -> its sizes, known without files. The first is what a run without weights
      builds and plans.
  """

  network: Callable[..., nnx.Module]
  config: type[ViTConfig]
  open: Callable[[Path], Checkpoint]
  published: Mapping[str, EmbedderSizes]


def published(kind: str, name: str = "") -> EmbedderSizes:
  """Sizes without weights: of the published checkpoint called `name`, else of the first one of the kind.

  Raises:
    ValueError: the kind is unknown.
  """
  sizes = registry.find(kind).published
  return sizes.get(name) or next(iter(sizes.values()))
