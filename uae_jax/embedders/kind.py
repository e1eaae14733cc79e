"""The definition of a kind of embedder, and the sizes of an embedder."""

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
  """The sizes of an embedder, without weights.

  Attributes:
    kind: one of `registry.KINDS`.
    network: config of the model.
    image_px: side of the model's square input, in pixels.
    mean: channel means of pixels in [0, 1].
    std: channel standard deviations of pixels in [0, 1].
  """

  kind: str
  network: ViTConfig
  image_px: int
  mean: tuple[float, float, float]
  std: tuple[float, float, float]

  def build(self, rngs: nnx.Rngs) -> nnx.Module:
    """The model with random parameters."""
    return registry.find(self.kind).network(self.network, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """The opened files of a published embedder.

  Attributes:
    network: config of the model.
    tensors: name -> array, read lazily.
    table: rows for every parameter of the model.
    ignored: regular expression over tensor names -> reason why matching tensors are not read.
    preprocessing: maps images to normalized pixels.
  """

  network: ViTConfig
  tensors: Mapping[str, Any]
  table: tuple[Row, ...]
  ignored: Mapping[str, str]
  preprocessing: Preprocessing


@dataclasses.dataclass(frozen=True)
class TextTower:
  """The opened files of the text tower of an embedder.

  Attributes:
    network: class of the model, called as `network(config, rngs=rngs)`; maps tokens int32[B, T] to float[B, E].
    config: config of the model, with `max_tokens`.
    tensors: name -> array, read lazily.
    table: rows for every parameter of the model.
    ignored: regular expression over tensor names -> reason why matching tensors are not read.
    tokenizer: reads the tokenizer; raises `ValueError`.
    is_lower_case: whether texts are written in lower case first, as in training.
    score_scale: factor between the cosine of image and text and the published score of the model.
  """

  network: Callable[..., nnx.Module]
  config: Any
  tensors: Mapping[str, Any]
  table: tuple[Row, ...]
  ignored: Mapping[str, str]
  tokenizer: Callable[[], Any]
  is_lower_case: bool = False
  score_scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Kind:
  """The definition of a kind of embedder.

  Attributes:
    network: class of the model, called as `network(config, rngs=rngs)`; maps normalized pixels float[B, H, W, 3] to
      features float[B, E], and by `patch_states` to those of its patches float[B, patches, D].
    config: class of the model's config.
    open: path -> checkpoint; raises `ValueError` that names the file.
    published: name of a published checkpoint -> its sizes, known without files. A run or plan without weights uses the
      first one.
    open_text: path -> text tower; raises `ValueError` that names the file. None: the kind has no text tower.
  """

  network: Callable[..., nnx.Module]
  config: type[ViTConfig]
  open: Callable[[Path], Checkpoint]
  published: Mapping[str, EmbedderSizes]
  open_text: Callable[[Path], TextTower] | None = None


def published(kind: str, name: str = "") -> EmbedderSizes:
  """Sizes of the published checkpoint `name`; those of the kind's first checkpoint if there is no such name.

  Raises:
    ValueError: the kind is unknown.
  """
  sizes = registry.find(kind).published
  return sizes.get(name) or next(iter(sizes.values()))
