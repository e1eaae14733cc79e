"""Text towers of the embedders that have one, on the host: texts as embeddings to compare with those of images."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from pathlib import Path
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from uae_jax import json_files, sharding
from uae_jax.data import processor_files
from uae_jax.embedders import host, longclip
from uae_jax.embedders.host import Embedder
from uae_jax.embedders.in_graph import NORM_FLOOR
from uae_jax.models.clip import CLIPConfig, CLIPText
from uae_jax.models.siglip2 import SigLIP2Config, SigLIP2Text
from uae_jax.weights import clip as clip_weights
from uae_jax.weights import longclip as longclip_weights
from uae_jax.weights import siglip2 as siglip2_weights
from uae_jax.weights import table, tensor_files

BATCH = 16
CLIP_TOKENIZER = ("vocab.json", "merges.txt")


@dataclasses.dataclass(frozen=True)
class Tower:
  """The opened files of a text tower.

  Attributes:
    network: class of the model, called as `network(config, rngs=rngs)`.
    config: config of the model, with `max_tokens`.
    tensors: name -> array, read lazily.
    rows: rows for every parameter.
    ignored: regular expression over tensor names -> reason why matching tensors are not read.
    tokenizer: folder of the tokenizer's files.
    is_lower_case: whether texts are written in lower case first, as in training.
  """

  network: Callable[..., nnx.Module]
  config: Any
  tensors: Mapping[str, Any]
  rows: tuple[table.Row, ...]
  ignored: Mapping[str, str]
  tokenizer: Path
  is_lower_case: bool = False


def _clip(path: Path) -> Tower:
  config = CLIPConfig.from_huggingface(json_files.read_object(path / "config.json")).text
  tensors = tensor_files.open_folder(path)
  return Tower(CLIPText, config, tensors, clip_weights.text_table(config), clip_weights.IGNORED_BY_TEXT, path)


def _siglip2(path: Path) -> Tower:
  config = SigLIP2Config.from_huggingface(json_files.read_object(path / "config.json")).text
  tensors, rows = tensor_files.open_folder(path), siglip2_weights.text_table(config)
  return Tower(SigLIP2Text, config, tensors, rows, siglip2_weights.IGNORED_BY_TEXT, path, is_lower_case=True)


def _longclip(path: Path) -> Tower:
  file = longclip.checkpoint_file(path)
  if absent := [name for name in CLIP_TOKENIZER if not (file.parent / name).is_file()]:
    raise ValueError(
      f"{file.parent}: no {absent[0]}: copy {' and '.join(CLIP_TOKENIZER)} of CLIP beside the checkpoint"
    )
  tensors = tensor_files.open_file(file)
  config = longclip_weights.config_of(tensors).text
  rows = longclip_weights.text_table(config)
  return Tower(CLIPText, config, tensors, rows, longclip_weights.IGNORED_BY_TEXT, file.parent)


TOWERS: dict[str, Callable[[Path], Tower]] = {"clip": _clip, "siglip2": _siglip2, "longclip": _longclip}


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
    """
    texts = [text.lower() for text in texts] if self._is_lower_case else list(texts)
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
  """

  image: Embedder
  text: TextEmbedder

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
    kind: one of `TOWERS`.
    path: as for `embedders.load`, with the files of the tokenizer; for longclip they are those of CLIP.

  Raises:
    ValueError: the kind has no text tower, or files are missing, corrupt or of another model.
  """
  if kind not in TOWERS:
    raise ValueError(f"{kind} has no text tower; expected one of {', '.join(TOWERS)}")
  image = host.load(kind, path)
  tower = TOWERS[kind](Path(path))
  mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
  graphdef, abstract = sharding.abstract_model(lambda: tower.network(tower.config, rngs=nnx.Rngs(0)), mesh)
  params = table.load(tower.tensors, tower.rows, abstract, ignored=tower.ignored, source=str(path))
  params = jax.tree.map(lambda x, want: jax.device_put(x, want.sharding), params, abstract)
  tokenizer = processor_files.read_text_tokenizer(kind, tower.tokenizer)
  return ImageTextEmbedder(
    image, TextEmbedder(params, tower.config.max_tokens, graphdef, tokenizer, tower.is_lower_case)
  )
