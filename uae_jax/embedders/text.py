"""Text towers of the embedders that have one, on the host: texts as embeddings to compare with those of images."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from pathlib import Path
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from uae_jax import cloud_storage, sharding
from uae_jax.data.texts import checked_texts
from uae_jax.embedders import host, registry
from uae_jax.embedders.host import Embedder
from uae_jax.embedders.in_graph import NORM_FLOOR
from uae_jax.embedders.kind import TextTower
from uae_jax.weights import table

BATCH = 16


def open_tower(kind: str, path: str | Path) -> TextTower:
  """Opens the text tower of an embedder; reads no weights.

  Raises:
    ValueError: the kind is unknown or has no text tower, or files are missing, corrupt or of another model.
  """
  open_text = registry.find(kind).open_text
  if open_text is None:
    having = [name for name in registry.KINDS if registry.find(name).open_text]
    raise ValueError(f"{kind} has no text tower; expected one of {', '.join(having)}")
  return open_text(Path(cloud_storage.fetched(path)))


@dataclasses.dataclass(frozen=True, eq=False)
class TextEmbedder:
  """A loaded text tower with its tokenizer.

  Attributes:
    params: nested dict of arrays.
    max_tokens: number of tokens that it reads, with start and end; longer texts are cut.
  """

  params: dict[str, Any]
  max_tokens: int
  _graphdef: nnx.GraphDef
  _tokenizer: Any
  _is_lower_case: bool

  def embed(self, texts: Sequence[str]) -> tuple[np.ndarray, list[int]]:
    """Embeds texts.

    Args:
      texts: B texts.

    Returns:
      (float32[B, E], rows of norm 1; number of tokens of each text before it was cut).

    Raises:
      ValueError: `texts` is one text or empty, or an item is no text or too long.
    """
    if not texts:
      raise ValueError("no texts to embed")
    texts = checked_texts("texts", texts)
    texts = [text.lower() for text in texts] if self._is_lower_case else texts
    lengths = [len(ids) for ids in self._tokenizer(texts, truncation=False, verbose=False)["input_ids"]]
    options = {"padding": "max_length", "max_length": self.max_tokens, "truncation": True}
    tokens = np.asarray(self._tokenizer(texts, **options)["input_ids"], np.int32)
    rows = []
    for start in range(0, len(tokens), BATCH):
      batch = tokens[start : start + BATCH]
      padded = np.pad(batch, ((0, BATCH - len(batch)), (0, 0)), mode="edge")
      rows.append(np.asarray(self._run(self.params, padded))[: len(batch)])
    return np.concatenate(rows), lengths

  @functools.cached_property
  def _run(self) -> Callable:
    def run(params, tokens):
      features = nnx.merge(self._graphdef, params)(tokens).astype(jnp.float32)
      return features / jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), NORM_FLOOR)

    return jax.jit(run)


@dataclasses.dataclass(frozen=True, eq=False)
class ImageTextEmbedder:
  """Both towers of an embedder, whose embeddings can be compared.

  Attributes:
    image: the image tower.
    text: the text tower.
    score_scale: factor between their cosine and the published score of the model.
  """

  image: Embedder
  text: TextEmbedder
  score_scale: float = 1.0

  @property
  def params(self) -> dict[str, Any]:
    """The parameters of both towers."""
    return {"image": self.image.params, "text": self.text.params}

  def embed(self, images: Sequence) -> np.ndarray:
    """Embeds images, float32[B, E], rows of norm 1."""
    return self.image.embed(images)


def load(kind: str, path: str | Path) -> ImageTextEmbedder:
  """Loads both towers of an embedder in float32, on one device.

  Args:
    kind: one of `registry.KINDS` with a text tower.
    path: as for `embedders.load`, with the files of the tokenizer; for longclip and hpsv2 they are those of CLIP.

  Raises:
    ValueError: see `open_tower`.
  """
  tower = open_tower(kind, path)
  image = host.load(kind, path)
  mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
  graphdef, abstract = sharding.abstract_model(lambda: tower.network(tower.config, rngs=nnx.Rngs(0)), mesh)
  params = table.load(tower.tensors, tower.table, abstract, ignored=tower.ignored, source=str(path))
  params = jax.tree.map(lambda x, want: jax.device_put(x, want.sharding), params, abstract)
  tokenizer = tower.tokenizer()
  words = TextEmbedder(params, tower.config.max_tokens, graphdef, tokenizer, tower.is_lower_case)
  return ImageTextEmbedder(image, words, tower.score_scale)
