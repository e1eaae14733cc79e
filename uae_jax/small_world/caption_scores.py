"""How much of a scene a caption says, and how much of what it says is right.

A caption is read as phrases between separators. Each phrase is matched, in order, to the object of the scene that
shares most of its words and was not matched before; a phrase that names a place is matched to the object at that
place if there is one. Words that the object has are right, each once; every other word is wrong. The background
phrase is right if its first background is the scene's and no earlier phrase said so.

  recall     right words / attributes of the scene: the background; place, size, color, shape and shift of each object
  precision  right words / words that claim something: all but separators and the word "background" beside its color
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from uae_jax.small_world import phrases, scenes
from uae_jax.small_world.scenes import Scene

RIGHT, WRONG, NEUTRAL = "right", "wrong", "neutral"


@dataclasses.dataclass(frozen=True)
class CaptionScore:
  """Attributes:

  num_right: words that are true of the scene.
  num_claimed: words that claim something.
  num_true: attributes of the scene.
  length: words of the caption, separators too.
  true_length: words of the full caption.
  words: (word, "right" | "wrong" | "neutral") in order.
  missing: attributes nobody mentioned, as "large (top-left green cross)" or "black background".
  """

  num_right: int
  num_claimed: int
  num_true: int
  length: int
  true_length: int
  words: tuple[tuple[str, str], ...]
  missing: tuple[str, ...]

  @property
  def recall(self) -> float:
    return self.num_right / self.num_true

  @property
  def precision(self) -> float:
    """1 for a caption that claims nothing."""
    return self.num_right / self.num_claimed if self.num_claimed else 1.0


def object_words(scene: Scene) -> list[list[str]]:
  """The attribute words of each object of one scene, in the order of a caption."""
  return [
    [item["place"], *item.get("shift", ()), item["size"], item["color"], item["shape"]]
    for item in phrases.attributes(scene)["objects"]
  ]


def score(caption: str, scene: Scene) -> CaptionScore:
  """Scores a caption of one scene; any text is allowed."""
  objects, background = object_words(scene), phrases.attributes(scene)["background"]
  unsaid = [set(words) for words in objects]
  is_matched = [False] * len(objects)
  is_background_said = False
  labels: list[tuple[str, str]] = []
  for phrase, separator in _phrases(caption.split()):
    if any(word == phrases.BACKGROUND_WORD or word in scenes.BACKGROUNDS for word in phrase):
      labels += _label_background(phrase, background, is_background_said)
      is_background_said |= (background, RIGHT) in labels[len(labels) - len(phrase) :]
    else:
      found = _match(phrase, objects, is_matched)
      if found is None:
        labels += [(word, WRONG) for word in phrase]
      else:
        is_matched[found] = True
        for word in phrase:
          labels.append((word, RIGHT if word in unsaid[found] else WRONG))
          unsaid[found].discard(word)
    labels += [(word, NEUTRAL) for word in separator]
  missing = [] if is_background_said else [f"{background} {phrases.BACKGROUND_WORD}"]
  for words, rest in zip(objects, unsaid, strict=True):
    for word in words:
      if word in rest:
        others = " ".join(other for other in words if other != word)
        missing.append(f"{word} ({others})")
  num_right = sum(label == RIGHT for _, label in labels)
  return CaptionScore(
    num_right=num_right,
    num_claimed=num_right + sum(label == WRONG for _, label in labels),
    num_true=1 + sum(len(words) for words in objects),
    length=len(labels),
    true_length=len(phrases.full_caption(scene).split()),
    words=tuple(labels),
    missing=tuple(missing),
  )


def _phrases(words: Sequence[str]) -> list[tuple[list[str], list[str]]]:
  """(words of a phrase, its separator or nothing) in order."""
  found, current = [], []
  for word in words:
    if word == phrases.SEPARATOR:
      found.append((current, [word]))
      current = []
    else:
      current.append(word)
  return [*found, (current, [])] if current else found


def _label_background(phrase: list[str], background: str, is_said: bool) -> list[tuple[str, str]]:
  """Only the first background named can be right; the word "background" alone is an empty claim, hence wrong."""
  labels, is_first = [], True
  names_one = any(word in scenes.BACKGROUNDS for word in phrase)
  for word in phrase:
    if word in scenes.BACKGROUNDS:
      labels.append((word, RIGHT if is_first and word == background and not is_said else WRONG))
      is_first = False
    else:
      labels.append((word, NEUTRAL if word == phrases.BACKGROUND_WORD and names_one else WRONG))
  return labels


def _match(phrase: list[str], objects: list[list[str]], is_matched: list[bool]) -> int | None:
  """The object a phrase speaks of; None if it shares no word with a free one."""
  free = [i for i in range(len(objects)) if not is_matched[i]]
  place = next((word for word in phrase if word in scenes.PLACES[2] + scenes.PLACES[3]), None)
  at_place = [i for i in free if place in objects[i]]
  candidates = at_place or free
  overlap = {i: len(set(phrase) & set(objects[i])) for i in candidates}
  best = max(candidates, key=lambda i: overlap[i], default=None)
  return best if best is not None and overlap[best] > 0 else None


def aggregate(scores: Sequence[CaptionScore]) -> dict[str, float]:
  """Figures of a set of captions: recall and precision over all words together, mean lengths in words."""
  right, claimed, true, length, true_length = np.sum(
    [(s.num_right, s.num_claimed, s.num_true, s.length, s.true_length) for s in scores], axis=0
  )
  return {
    "caption_recall": float(right / true),
    "caption_precision": float(right / claimed) if claimed else 1.0,
    "caption_length": float(length / len(scores)),
    "true_caption_length": float(true_length / len(scores)),
  }


def hallucination_warnings(before: dict[str, float], after: dict[str, float], *, tolerance: float = 0.02) -> list[str]:
  """What says that captions grew by invention: the signs of a decoder too weak to tell true words from false ones.

  Args:
    before: `aggregate` before reinforcement learning.
    after: `aggregate` after it.
    tolerance: absolute for precision, relative for length.
  """
  warnings = []
  if after["caption_precision"] < before["caption_precision"] - tolerance:
    warnings.append(f"precision fell from {before['caption_precision']:.2f} to {after['caption_precision']:.2f}")
  if after["caption_length"] > after["true_caption_length"] * (1 + tolerance):
    warnings.append(
      f"captions have {after['caption_length']:.1f} words, everything there is to say takes "
      f"{after['true_caption_length']:.1f}"
    )
  return warnings
