"""Captions of the variant "rich": a grammar with synonyms, several word orders, counts and relations, up to 60 words.

  the background is teal ; there are two objects ; upper-left : big red circle , lined ;
  a small solid pink bar at center ; red circle above pink bar ;

A caption has a phrase for the background, one for the number of objects, one per object in reading order, and one for
a relation of two objects; each ends in a semicolon. Without draws, it is the canonical caption: the first form of
every phrase and no synonyms. `caption_scores.py` reads all of them, by the canonical words.
"""

from collections.abc import Callable, Sequence

import numpy as np

from uae_jax.draws import Draws
from uae_jax.small_world.scenes import BACKGROUNDS, MAX_PARAPHRASED_WORDS, PLACES, Scene, variant

SEPARATOR = ";"
COUNTS = ("one", "two", "three", "four", "five", "six")
RELATIONS = ("left-of", "right-of", "above", "below", "same-size-as", "same-texture-as")
OPPOSITE = {"left-of": "right-of", "right-of": "left-of", "above": "below", "below": "above"}
SYNONYMS = {
  "small": ("tiny", "little"),
  "medium": ("mid-sized",),
  "large": ("big",),
  "circle": ("disc",),
  "square": ("box",),
  "cross": ("plus",),
  "diamond": ("rhombus",),
  "purple": ("violet",),
  "solid": ("filled",),
  "striped": ("lined",),
  "hollow": ("empty",),
  "top-left": ("upper-left",),
  "top-right": ("upper-right",),
  "bottom-left": ("lower-left",),
  "bottom-right": ("lower-right",),
  "center": ("middle",),
  "left-of": ("leftward-of",),
  "right-of": ("rightward-of",),
  "above": ("over",),
  "below": ("under",),
}
CANONICAL = {synonym: word for word, synonyms in SYNONYMS.items() for synonym in synonyms}
BACKGROUND_FORMS = ("{} background", "the background is {}", "on a {} background")
COUNT_FORMS = ("{} objects", "there are {} objects", "{} things")
OBJECT_FORMS = (
  "{place} {size} {texture} {color} {shape}",
  "{place} : {size} {color} {shape} , {texture}",
  "a {size} {texture} {color} {shape} at {place}",
  "{place} {texture} {shape} , {color} and {size}",
)
# Words without a claim, wherever they stand.
FUNCTION_WORDS = ("background", "the", "is", "on", "a", "objects", "there", "are", "things", ":", ",", "at", "and")

_RICH = variant("rich")
_CANONICAL_WORDS = (
  *(*BACKGROUNDS, *COUNTS, *PLACES[3], *RELATIONS),
  *(*_RICH.sizes, *_RICH.textures, *_RICH.colors, *_RICH.shapes),
)
WORDS = (SEPARATOR, *FUNCTION_WORDS, *_CANONICAL_WORDS, *CANONICAL)


def object_words(scene: Scene) -> list[dict[str, str]]:
  """The words of each object of one scene in reading order: place, size, texture, color, shape."""
  config = scene.config
  return [
    {
      "place": config.places[i],
      "size": config.sizes[scene.size[i]],
      "texture": config.textures[scene.texture[i]],
      "color": config.colors[scene.color[i]],
      "shape": config.shapes[scene.shape[i]],
    }
    for i in np.flatnonzero(scene.present)
  ]


def holds(relation: str, first: dict[str, str], second: dict[str, str]) -> bool:
  """Whether a relation of `RELATIONS` holds between two objects, as of `object_words`."""
  if relation.startswith("same-"):
    name = relation.split("-")[1]
    return first[name] == second[name]
  (row, column), (other_row, other_column) = (divmod(PLACES[3].index(item["place"]), 3) for item in (first, second))
  return {
    "left-of": column < other_column,
    "right-of": column > other_column,
    "above": row < other_row,
    "below": row > other_row,
  }[relation]


def is_true(relation: str, first: Sequence[str], second: Sequence[str], objects: list[dict[str, str]]) -> bool:
  """Whether two different objects that have all words of `first` and of `second` stand in a relation."""
  return any(
    holds(relation, one, other)
    for one in objects
    for other in objects
    if one is not other and set(first) <= set(one.values()) and set(second) <= set(other.values())
  )


def captions_text(scene: Scene, captions: str, draws: Draws | None = None) -> list[str]:
  """The captions of a batch of scenes; arguments as for `phrases.captions_text`.

  A partial caption leaves out every phrase with a probability that is drawn per caption from U(0.1, 0.75), but not the
  phrase of the first object.
  """
  count = len(scene.background)
  if draws is None:
    if captions != "full":
      raise ValueError(f"captions = {captions!r} needs draws")
    return [_caption(scene[row], None) for row in range(count)]
  luck, said, rate, is_full = draws.uniform(48), draws.uniform(16), draws.uniform(1), draws.uniform(1)
  keeps = said > 0.1 + 0.65 * rate
  keeps |= captions == "full"
  keeps |= (captions == "mixed") & (is_full < 0.6)
  return [_caption(scene[row], luck[row], keeps[row]) for row in range(count)]


def full_caption(scene: Scene) -> str:
  """The canonical caption of one scene."""
  return _caption(scene, None)


def _caption(scene: Scene, luck: np.ndarray | None, keeps: np.ndarray | None = None) -> str:
  """The caption of one scene from 48 uniform draws; None takes the canonical one."""
  draw = iter(luck.tolist()) if luck is not None else None
  said = iter(keeps.tolist()) if keeps is not None else None

  def pick(choices):
    return choices[int(next(draw) * len(choices))] if draw is not None else choices[0]

  def word(canonical: str) -> str:
    synonyms = SYNONYMS.get(canonical, ())
    return pick((canonical, *synonyms)) if synonyms else canonical

  def is_said() -> bool:
    return said is None or next(said)

  items = object_words(scene)
  text = []
  if is_said():
    text.append(pick(BACKGROUND_FORMS).format(BACKGROUNDS[int(scene.background)]))
  if is_said():
    text.append(pick(COUNT_FORMS).format(COUNTS[len(items) - 1]))
  for i, item in enumerate(items):
    if is_said() or i == 0:
      text.append(pick(OBJECT_FORMS).format(**{name: word(value) for name, value in item.items()}))
  relation = _relation(scene, items, pick if draw is not None else None, word)
  if is_said() and relation and sum(len(phrase.split()) + 1 for phrase in [*text, relation]) <= MAX_PARAPHRASED_WORDS:
    text.append(relation)
  return " ".join(f"{phrase} {SEPARATOR}" for phrase in text)


def _relation(scene: Scene, items: list[dict[str, str]], pick: Callable | None, word: Callable) -> str:
  """A true phrase about two objects; empty if there is one object.

  The canonical one is about the first two; which of them comes first depends on the places only, so that a change of
  an attribute changes nothing else in the caption.
  """
  if len(items) < 2:
    return ""
  if pick is None:
    first, second = items[:2]
    if np.sum(np.flatnonzero(scene.present)) % 2:
      first, second = second, first
    relation = next(name for name in OPPOSITE if holds(name, first, second))
  else:
    first = pick(items)
    second = pick([item for item in items if item is not first])
    relation = pick([name for name in RELATIONS if holds(name, first, second)])
  said = [word(item[name]) for item in (first, second) for name in ("color", "shape")]
  return f"{said[0]} {said[1]} {word(relation)} {said[2]} {said[3]}"
