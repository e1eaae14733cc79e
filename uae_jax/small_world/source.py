"""The small world as a data source: procedural scenes by index, and scenes stored on disk by `tfds.py`.

Both support every kind of caption, and groups of edited scenes for contrastive training. `data/sources.py` defines the
interface of a source.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

from uae_jax.draws import Draws
from uae_jax.small_world import paraphrases, phrases, render, scenes
from uae_jax.small_world.ground_truth import GroundTruth
from uae_jax.small_world.processor import word_ids
from uae_jax.small_world.scenes import Scene, SceneConfig

# Separate streams of random draws, so that captions and edits of a record are independent.
_CAPTION_STREAM, _EDIT_STREAM = 1, 2
MORE_HELD_OUT = ("held_out_pairs",)


class ProceduralScenes:
  """Scenes generated from their indices, without storage; batches are generated at about 10 us per scene.

  Args:
    split: one of `scenes.SPLITS`.
    config: size of the world.
  """

  more_held_out = MORE_HELD_OUT

  def __init__(self, split: str, config: SceneConfig):
    self._split, self._config = split, config
    self.image_px = config.image_px

  def __len__(self) -> int:
    return scenes.NUM_SCENES

  def __getitem__(self, index: int) -> dict:
    return self.records([index])[0]

  def key(self, index: int) -> str:
    return f"{self._split} scene {index}"

  def records(self, indices: Sequence[int]) -> list[dict]:
    """The records at several indices, faster than one at a time."""
    batch = scenes.scenes(indices, self._split, self._config)
    columns = zip(render.render_batch(batch), phrases.captions_text(batch, "full"), batch.to_array(), strict=True)
    return [{"image": image, "caption": caption, "scene": scene} for image, caption, scene in columns]

  def batch_maker(self, processor, caption_tokens: int, captions: str, seed: int) -> "MakeScenes":
    return MakeScenes(self._split, SceneCaptions.of(self._config, processor, caption_tokens, captions, seed))

  def ground_truth(self, records: Sequence[dict]) -> GroundTruth:
    return _ground_truth(records, self._config)


class StoredScenes:
  """Scenes on disk, as records with image, full caption and `scene`.

  Args:
    stored: source of the records.
    config: size of the world that the scenes come from.
    more_held_out: the splits of `MORE_HELD_OUT` that are stored.
  """

  def __init__(self, stored, config: SceneConfig, more_held_out: Sequence[str] = MORE_HELD_OUT):
    self._stored, self._config, self.more_held_out = stored, config, tuple(more_held_out)

  def __len__(self) -> int:
    return len(self._stored)

  def __getitem__(self, index: int) -> dict:
    return self._stored[index]

  def key(self, index: int) -> str:
    return self._stored.key(index)

  def caption(self, index: int) -> str:
    return self._stored.caption(index)

  def fields(self) -> Sequence[str]:
    return self._stored.fields()

  def fingerprint(self) -> dict[str, int | str]:
    return self._stored.fingerprint()

  def record_captioner(self, processor, caption_tokens: int, captions: str, seed: int) -> "CaptionStoredScenes":
    return CaptionStoredScenes(SceneCaptions.of(self._config, processor, caption_tokens, captions, seed))

  def ground_truth(self, records: Sequence[dict]) -> GroundTruth:
    return _ground_truth(records, self._config)


def stored_config(name: str, variant: str) -> SceneConfig:
  """The `SceneConfig` of a stored dataset.

  Args:
    name: name of the TFDS dataset, such as uae_scenes/plain.
    variant: `data.variant`, which must equal the stored variant.

  Raises:
    ValueError: the variants differ.
  """
  stored = name.partition("/")[2].partition(":")[0] or next(iter(scenes.VARIANTS))
  if stored != variant:
    raise ValueError(f"data.variant = {variant!r}, but data.source = tfds:{name} has {stored!r}: set both to the same")
  return scenes.variant(variant)


def _ground_truth(records: Sequence[dict], config: SceneConfig) -> GroundTruth:
  return GroundTruth(Scene.from_array(np.stack([record["scene"] for record in records]), config))


# --- Batches ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class SceneCaptions:
  """Makes batches of tokenized captions of scenes, or of contrastive groups.

  Attributes:
    config: size of the world.
    processor: `data.processing.Processor`, which tokenizes the captions.
    caption_tokens: L, number of tokens per row.
    word_ids: int32[words], token ids of `phrases.WORDS`; None if words are not single tokens, or captions paraphrased.
    captions: "full", "partial", "mixed" or "contrastive".
    seed: seed of what captions omit and of edits.
  """

  config: SceneConfig
  processor: Any
  caption_tokens: int
  word_ids: np.ndarray | None
  captions: str
  seed: int

  @classmethod
  def of(cls, config: SceneConfig, processor, caption_tokens: int, captions: str, seed: int) -> "SceneCaptions":
    tokenizer = processor.tokenizer
    if not config.is_paraphrased:
      return cls(config, processor, caption_tokens, word_ids(tokenizer), captions, seed)
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in processor.encode(" ".join(paraphrases.WORDS)):
      raise ValueError('data.variant = "rich" has words that the processor lacks: set model = "rich_scenes"')
    return cls(config, processor, caption_tokens, None, captions, seed)

  def batch(self, scene: Scene, position: np.ndarray, index: np.ndarray, image: np.ndarray | None = None) -> dict:
    """Makes a batch of b scenes; see `data.pipeline.make_dataset`.

    Args:
      scene: b scenes.
      position: int64[b], positions in the endless order, which seed what differs between epochs.
      index: int64[b], indices of the records.
      image: uint8[b, side, side, 3], stored images; None renders the scenes.
    """
    if self.captions == "contrastive":
      return self._contrastive(scene, position, index, image)
    tokens, length = self.to_tokens(scene, self.captions, Draws(self.seed, position, _CAPTION_STREAM))
    return {
      "image": render.render_batch(scene) if image is None else image,
      "tokens": tokens,
      "length": length,
      "index": index,
    }

  def _contrastive(self, scene: Scene, position: np.ndarray, index: np.ndarray, image: np.ndarray | None) -> dict:
    groups = scenes.edit_groups(scene, Draws(self.seed, position, _EDIT_STREAM))
    shape = groups.background.shape
    flat = Scene.from_array(groups.to_array().reshape(shape[0] * shape[1], -1), groups.config)
    tokens, length = self.to_tokens(flat, "full", None)
    images = render.render_batch(flat).reshape(*shape, *[groups.config.image_px] * 2, 3)
    if image is not None:
      images[:, 0] = image
    return {
      "image": images,
      "tokens": tokens.reshape(*shape, -1),
      "length": length.reshape(shape),
      "index": index,
      "identity": groups.identity(),
    }

  def to_tokens(self, scene: Scene, captions: str, draws: Draws | None) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32[B, L], length int32[B]) of captions of B scenes.

    Raises:
      ValueError: the longest possible caption does not fit into a row.
    """
    row_length = self.caption_tokens
    is_word_a_token = self.word_ids is not None or scene.config.is_paraphrased
    if is_word_a_token and scene.config.max_caption_words >= row_length:
      raise ValueError(
        f"data.caption_tokens = {row_length}: captions of this data.variant need {scene.config.max_caption_words + 1}"
      )
    if self.word_ids is None:
      return self.processor.caption_rows(phrases.captions_text(scene, captions, draws), row_length)
    words, said = phrases.caption_words(scene, captions, draws)
    count = np.sum(said, axis=1)
    tokens = np.full((len(words), row_length), self.processor.pad_id, np.int32)
    place = np.cumsum(said, axis=1) - 1
    row, slot = np.nonzero(said)
    tokens[row, place[row, slot]] = self.word_ids[words[row, slot]]
    tokens[np.arange(len(words)), count] = self.processor.end_ids[0]
    return tokens, (count + 1).astype(np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class MakeScenes:
  """Maps int64[b, 2], rows of (position, index), to a batch of procedural scenes."""

  split: str
  captions: SceneCaptions

  def __call__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
    position, index = rows[:, 0], rows[:, 1] % scenes.NUM_SCENES
    return self.captions.batch(scenes.scenes(index, self.split, self.captions.config), position, index)


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionStoredScenes:
  """Makes a batch from columns of stored records."""

  captions: SceneCaptions

  def __call__(self, columns: dict) -> dict[str, np.ndarray]:
    scene = Scene.from_array(columns["scene"], self.captions.config)
    index = columns["index"].astype(np.int64)
    return self.captions.batch(scene, columns["position"], index, columns["image"])
