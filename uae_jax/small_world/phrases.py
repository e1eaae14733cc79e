"""Captions and attributes of scenes as words.

Captions name the place of an object first, so a causal language model knows it when it reads the rest:

  black background ; top-left large green cross ; bottom-right small white triangle ;
"""

import numpy as np

from uae_jax.draws import Draws
from uae_jax.small_world import paraphrases
from uae_jax.small_world.scenes import BACKGROUNDS, COLORS, PLACES, SHAPES, SIZES, Scene

SHIFTS_X = ("shifted-left", "", "shifted-right")
SHIFTS_Y = ("shifted-up", "", "shifted-down")
SEPARATOR = ";"
BACKGROUND_WORD = "background"

# All words of all variants with fixed phrases, which share one vocabulary.
WORDS = (
  SEPARATOR,
  BACKGROUND_WORD,
  *SIZES,
  *COLORS,
  *SHAPES,
  *PLACES[2],
  *(place for place in PLACES[3] if place not in PLACES[2]),
  *(word for word in SHIFTS_X + SHIFTS_Y if word),
  *BACKGROUNDS,
)
_WORD_ID = {word: i for i, word in enumerate(WORDS)}

CAPTIONS = ("full", "partial", "mixed")
FULL_FRACTION = 0.6  # Probability of a full caption under "mixed".


def _ids(words) -> np.ndarray:
  return np.array([_WORD_ID.get(word, 0) for word in words])


def caption_words(scene: Scene, captions: str, draws: Draws | None = None) -> tuple[np.ndarray, np.ndarray]:
  """The word slots of a batch of captions, and which of them are used.

  A partial caption keeps each object with a probability drawn per caption from U(0.25, 0.9), but at least one object;
  place, size and color each with a probability from U(0.2, 0.95); and the background with probability 0.4. A shift is
  kept with its place.

  Args:
    scene: a batch [B].
    captions: "full", "partial" or "mixed" (full with probability 0.6).
    draws: B rows; required unless `captions` is "full".

  Returns:
    (indices into `WORDS` int64[B, S], whether the slot is used bool[B, S]).

  Raises:
    ValueError: `draws` is None, and `captions` is not "full".
  """
  config, present = scene.config, scene.present
  batch, places = present.shape
  word = np.empty((batch, places, 7), np.int64)
  word[..., 0] = _ids(config.places)
  word[..., 1] = _ids(SHIFTS_X)[scene.shift % 3]
  word[..., 2] = _ids(SHIFTS_Y)[scene.shift // 3]
  word[..., 3] = _ids(SIZES)[scene.size]
  word[..., 4] = _ids(COLORS)[scene.color]
  word[..., 5] = _ids(SHAPES)[scene.shape]
  word[..., 6] = _WORD_ID[SEPARATOR]
  said = np.repeat(present[..., None], 7, axis=-1)
  said[..., 1] &= bool(config.shift_px) & (scene.shift % 3 != 1)
  said[..., 2] &= bool(config.shift_px) & (scene.shift // 3 != 1)
  says_background = np.ones((batch, 1), bool)
  if captions != "full":
    if draws is None:
      raise ValueError(f"captions = {captions!r} needs draws")
    luck = np.where(present, draws.uniform(places), 2.0)
    keeps_object = (luck < 0.25 + 0.65 * draws.uniform(1)) | (luck == np.min(luck, axis=-1, keepdims=True))
    rates = 0.2 + 0.75 * draws.uniform(1, 3)
    keeps_place, keeps_size, keeps_color = np.moveaxis(draws.uniform(places, 3) < rates, -1, 0)
    keeps_background = draws.uniform(1) < 0.4
    is_full = draws.uniform(1) < (FULL_FRACTION if captions == "mixed" else 0.0)
    said[..., :3] &= (keeps_place | is_full)[..., None]
    said[..., 3] &= keeps_size | is_full
    said[..., 4] &= keeps_color | is_full
    said &= (keeps_object | is_full)[..., None]
    says_background = keeps_background | is_full
  says_background = np.broadcast_to(says_background, (batch, 1))
  background = np.stack(
    [
      _ids(BACKGROUNDS)[scene.background],
      np.full(batch, _WORD_ID[BACKGROUND_WORD]),
      np.full(batch, _WORD_ID[SEPARATOR]),
    ],
    -1,
  )
  return (
    np.concatenate([background, word.reshape(batch, -1)], axis=1),
    np.concatenate([np.repeat(says_background, 3, axis=1), said.reshape(batch, -1)], axis=1),
  )


def captions_text(scene: Scene, captions: str, draws: Draws | None = None) -> list[str]:
  """The captions of a batch of scenes as text; arguments as for `caption_words`.

  Paraphrased captions depend on `draws` even if they are full; without draws, they are the canonical ones.
  """
  if scene.config.is_paraphrased:
    return paraphrases.captions_text(scene, captions, draws)
  words, said = caption_words(scene, captions, draws)
  return [" ".join(WORDS[i] for i in row[keep]) for row, keep in zip(words, said, strict=True)]


def full_caption(scene: Scene) -> str:
  """The full caption of one scene."""
  return captions_text(scene[None], "full")[0]


def attributes(scene: Scene) -> dict:
  """Attributes of one scene for JSON: background, and place, size, color, shape (texture, shift) of each object."""
  config = scene.config
  objects = []
  for place in np.flatnonzero(scene.present):
    item: dict[str, str | list[str]] = {
      "place": config.places[place],
      "size": config.sizes[scene.size[place]],
      "color": config.colors[scene.color[place]],
      "shape": config.shapes[scene.shape[place]],
    }
    if len(config.textures) > 1:
      item["texture"] = config.textures[scene.texture[place]]
    if config.names_shift:
      shift = int(scene.shift[place])
      item["shift"] = [word for word in (SHIFTS_X[shift % 3], SHIFTS_Y[shift // 3]) if word]
    objects.append(item)
  return {"background": BACKGROUNDS[int(scene.background)], "objects": objects}
