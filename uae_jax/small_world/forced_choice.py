"""Forced choice between the full caption of a scene and one with a single change: understanding without decoding.

A model chooses by the log-probability of whole captions, so verbosity gains nothing: both have the same number of
words. Changes, by kind:

  shape, color, size   of one object
  place                an object moves to an empty place
  binding              two objects exchange their colors
  background           another color
  texture              of one object, in the variant "rich"
  count                the number of objects that the caption states, in the variant "rich"
  relation             the opposite of the relation that the caption states, in the variant "rich"
"""

import dataclasses

import numpy as np

from uae_jax.draws import Draws
from uae_jax.small_world import paraphrases
from uae_jax.small_world.phrases import captions_text
from uae_jax.small_world.scenes import BACKGROUNDS, Scene, SceneConfig

KINDS = ("shape", "color", "size", "place", "binding", "background")
MORE_KINDS = ("texture", "count", "relation")


@dataclasses.dataclass(frozen=True, eq=False)
class ForcedChoice:
  """One change of each of B scenes.

  Attributes:
    kind: one of `kinds_of` the world.
    captions: B captions with the change.
    is_possible: bool[B], whether the scene allows the change; a binding needs two objects of different colors.
    size: int[B], index into the sizes of the world, of the object that is changed; -1 if it is not a change of one.
    size_words: sizes of the world.
  """

  kind: str
  captions: list[str]
  is_possible: np.ndarray
  size: np.ndarray
  size_words: tuple[str, ...]


def kinds_of(config: SceneConfig) -> tuple[str, ...]:
  """The kinds of changes in a world."""
  return KINDS + MORE_KINDS if config.is_paraphrased else KINDS


def forced_choices(scene: Scene, draws: Draws) -> list[ForcedChoice]:
  """A change of every kind for every scene of a batch; `draws` has one row per scene."""
  return [_choice(kind, scene, draws) for kind in kinds_of(scene.config)]


def _choice(kind: str, scene: Scene, draws: Draws) -> ForcedChoice:
  if kind in ("count", "relation"):
    return _choice_of_words(kind, scene, draws)
  config = scene.config
  places = scene.present.shape[-1]
  luck = draws.uniform(places)
  chosen = _best(scene.present, luck)
  rows, columns = np.arange(len(chosen)), np.argmax(chosen, axis=-1)
  size = scene.size[rows, columns]
  is_possible = np.ones(len(chosen), bool)
  if kind == "background":
    background = (scene.background + 1 + draws.integers(len(BACKGROUNDS) - 1)) % len(BACKGROUNDS)
    changed, size = dataclasses.replace(scene, background=background), np.full(len(chosen), -1)
  elif kind == "place":
    empty = ~scene.present
    is_possible = np.any(empty, axis=-1)
    target = _best(empty, luck)
    fields = {name: getattr(scene, name) for name in ("shape", "color", "size", "texture", "shift")}
    moved = {name: np.where(target, value[rows, columns][:, None], value) for name, value in fields.items()}
    changed = dataclasses.replace(scene, present=(scene.present & ~chosen) | target, **moved)
  elif kind == "binding":
    differs = scene.present & (scene.color != scene.color[rows, columns][:, None])
    is_possible, size = np.any(differs, axis=-1), np.full(len(chosen), -1)
    other = _best(differs, luck)
    color = np.where(chosen, scene.color[rows, np.argmax(other, axis=-1)][:, None], scene.color)
    changed = dataclasses.replace(scene, color=np.where(other, scene.color[rows, columns][:, None], color))
  else:
    count = len(getattr(config, f"{kind}s"))
    value = getattr(scene, kind)
    new = (value + 1 + draws.integers(count - 1)[:, None]) % count
    changed = dataclasses.replace(scene, **{kind: np.where(chosen, new, value)})
  return ForcedChoice(kind, captions_text(changed, "full"), is_possible, size, config.sizes)


def _choice_of_words(kind: str, scene: Scene, draws: Draws) -> ForcedChoice:
  """A change of one word of the canonical caption that no scene has: the number of objects, or the relation."""
  new = (np.sum(scene.present, axis=-1) + draws.integers(scene.config.max_objects - 1)) % scene.config.max_objects
  captions, is_possible = [], []
  for row, text in enumerate(captions_text(scene, "full")):
    words = text.split()
    if kind == "count":
      at = next(i for i, word in enumerate(words) if word in paraphrases.COUNTS)
      words[at] = paraphrases.COUNTS[new[row]]
      is_possible.append(True)
    else:
      relation = next((i for i, word in enumerate(words) if word in paraphrases.OPPOSITE), None)
      is_possible.append(relation is not None)
      if relation is not None:
        words[relation] = paraphrases.OPPOSITE[words[relation]]
        first, second = words[relation - 2 : relation], words[relation + 1 : relation + 3]
        is_possible[-1] = not paraphrases.is_true(words[relation], first, second, paraphrases.object_words(scene[row]))
    captions.append(" ".join(words))
  return ForcedChoice(kind, captions, np.array(is_possible), np.full(len(captions), -1), scene.config.sizes)


def _best(candidates: np.ndarray, luck: np.ndarray) -> np.ndarray:
  """The luckiest candidate of each row as bool[B, P], all False in a row without one."""
  best = np.argmax(np.where(candidates, luck, -1.0), axis=-1)
  return candidates & (np.arange(candidates.shape[-1]) == best[:, None])


def accuracy(choices: list[ForcedChoice], is_right: np.ndarray) -> dict[str, float]:
  """Shares of right choices: of all, by kind, and by the size of the changed object.

  Args:
    choices: result of `forced_choices` for B scenes.
    is_right: bool[B, kinds], whether the true caption is the more likely one.

  Returns:
    "forced_choice" and "forced_choice_<kind or size>"; without what no scene allows.
  """
  possible = np.stack([choice.is_possible for choice in choices], axis=1)
  size = np.stack([choice.size for choice in choices], axis=1)
  groups = {"": possible}
  kinds = np.array([choice.kind for choice in choices])
  groups |= {f"_{kind}": possible & (kinds == kind) for kind in kinds}
  groups |= {f"_{name}": possible & (size == i) for i, name in enumerate(choices[0].size_words)}
  return {f"forced_choice{name}": float(np.mean(is_right[group])) for name, group in groups.items() if np.any(group)}
