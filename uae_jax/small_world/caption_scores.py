"""Recall and precision of captions against the ground truth of their scenes.

A caption is split into phrases at separators. Each phrase is matched, in order, to the unmatched object of the scene
that shares the most words with it; a phrase that names a place is matched to the object at that place if there is one.
A word is right if it is an attribute of that object, once per attribute; every other word is wrong. The background
phrase is right if its first background is the scene's and no earlier phrase named it.

  recall     right words / attributes of the scene: the background; place, size, color, shape and shift of each object
  precision  right words / claims: all words but separators and the word "background" next to a background color

Captions of the paraphrasing grammar are read by their canonical words, and words without a claim count for nothing.
Their textures and the number of objects are attributes too. A relation is a claim, wrong unless two objects fit it; a
true one is neither in recall nor in precision.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from uae_jax.small_world import paraphrases, phrases, scenes
from uae_jax.small_world.scenes import Scene

RIGHT, WRONG, NEUTRAL = "right", "wrong", "neutral"


@dataclasses.dataclass(frozen=True)
class CaptionScore:
  """The score of one caption.

  Attributes:
    num_right: number of right words.
    num_claimed: number of right and wrong words.
    num_true: number of attributes of the scene.
    length: number of words of the caption, including separators.
    true_length: number of words of the full caption, including separators.
    words: (word, "right" | "wrong" | "neutral") of the caption, in order.
    missing: attributes that the caption omits, such as "large (top-left green cross)" or "black background".
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
    """Fraction of the claims that are right; 1 for a caption without claims."""
    return self.num_right / self.num_claimed if self.num_claimed else 1.0


def object_words(scene: Scene) -> list[list[str]]:
  """The attribute words of each object of one scene, in caption order."""
  return [
    [item["place"], *item.get("shift", ()), item["size"], *_texture(item), item["color"], item["shape"]]
    for item in phrases.attributes(scene)["objects"]
  ]


def _texture(item: dict) -> list[str]:
  return [item["texture"]] if "texture" in item else []


def score(caption: str, scene: Scene) -> CaptionScore:
  """Scores a caption, which may be any text, against one scene."""
  background = phrases.attributes(scene)["background"]
  if scene.config.is_paraphrased:
    return _score_paraphrase(caption, scene, background)
  return score_words(caption, object_words(scene), background, len(phrases.full_caption(scene).split()))


def score_words(caption: str, objects: list[list[str]], background: str, true_length: int) -> CaptionScore:
  """Scores a caption against attributes as words.

  Args:
    caption: any text.
    objects: the attribute words of each object; those that have no word are left out.
    background: color of the background.
    true_length: number of words of the full caption, including separators.
  """
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
    true_length=true_length,
    words=tuple(labels),
    missing=tuple(missing),
  )


def _score_paraphrase(caption: str, scene: Scene, background: str) -> CaptionScore:
  """Scores a caption of the paraphrasing grammar: count and relation here, the other phrases by `score_words`."""
  said = caption.split()
  objects = paraphrases.object_words(scene)
  count = paraphrases.COUNTS[len(objects) - 1]
  labels: list[str | None] = []  # None: left to score_words
  is_count_said = False
  for phrase, separator in _phrases([paraphrases.CANONICAL.get(word, word) for word in said]):
    if any(word in paraphrases.RELATIONS for word in phrase):
      labels += _label_relation(phrase, objects)
    elif any(word in paraphrases.COUNTS for word in phrase):
      for word in phrase:
        is_right = word == count and not is_count_said
        is_count_said |= is_right
        labels.append(RIGHT if is_right else NEUTRAL if word in paraphrases.FUNCTION_WORDS else WRONG)
    else:
      names_background = any(word in scenes.BACKGROUNDS for word in phrase)
      is_neutral = [w in paraphrases.FUNCTION_WORDS and (names_background or w != "background") for w in phrase]
      labels += [NEUTRAL if neutral else None for neutral in is_neutral]
    labels += [None] * len(separator)
  rest = [paraphrases.CANONICAL.get(word, word) for word, label in zip(said, labels, strict=True) if label is None]
  found = score_words(" ".join(rest), object_words(scene), background, len(phrases.full_caption(scene).split()))
  others = iter(found.words)
  words = tuple((word, label or next(others)[1]) for word, label in zip(said, labels, strict=True))
  num_right = sum(label == RIGHT for _, label in words)
  return CaptionScore(
    num_right=num_right,
    num_claimed=num_right + sum(label == WRONG for _, label in words),
    num_true=found.num_true + 1,
    length=len(words),
    true_length=found.true_length,
    words=words,
    missing=(() if is_count_said else (f"{count} objects",)) + found.missing,
  )


def _label_relation(phrase: list[str], objects: list[dict[str, str]]) -> list[str | None]:
  """Labels a phrase about two objects: its relation is wrong unless it is true, other words if no object has them."""
  at = next(i for i, word in enumerate(phrase) if word in paraphrases.RELATIONS)
  first, second = ([w for w in side if w not in paraphrases.FUNCTION_WORDS] for side in (phrase[:at], phrase[at + 1 :]))
  is_true = bool(first and second) and paraphrases.is_true(phrase[at], first, second, objects)
  known = {word for item in objects for word in item.values()} | set(paraphrases.FUNCTION_WORDS)
  labels: list[str | None] = [NEUTRAL if word in known else WRONG for word in phrase]
  labels[at] = NEUTRAL if is_true else WRONG
  return labels


def _phrases(words: Sequence[str]) -> list[tuple[list[str], list[str]]]:
  """Splits words into (words of a phrase, its separator as a list of one or zero words), in order."""
  found: list[tuple[list[str], list[str]]] = []
  current: list[str] = []
  for word in words:
    if word == phrases.SEPARATOR:
      found.append((current, [word]))
      current = []
    else:
      current.append(word)
  return [*found, (current, [])] if current else found


def _label_background(phrase: list[str], background: str, is_said: bool) -> list[tuple[str, str]]:
  """Labels a background phrase: only its first background can be right; "background" without a color is wrong."""
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
  """The index of the object that a phrase describes; None if it shares no word with an unmatched object."""
  free = [i for i in range(len(objects)) if not is_matched[i]]
  place = next((word for word in phrase if word in scenes.PLACES[2] + scenes.PLACES[3]), None)
  at_place = [i for i in free if place in objects[i]]
  candidates = at_place or free
  overlap = {i: len(set(phrase) & set(objects[i])) for i in candidates}
  best = max(candidates, key=lambda i: overlap[i], default=None)
  return best if best is not None and overlap[best] > 0 else None


def aggregate(scores: Sequence[CaptionScore]) -> dict[str, float]:
  """Metrics of a set of captions: recall and precision over all words together, mean lengths in words."""
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
  """Warnings about captions that grew by hallucination, as happens if the decoder is too weak to punish wrong words.

  Args:
    before: result of `aggregate` before reinforcement learning.
    after: result of `aggregate` after reinforcement learning.
    tolerance: absolute tolerance for precision, relative tolerance for length.
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
