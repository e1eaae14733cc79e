"""Forced choice between the full caption of a scene and one with a single change: understanding without decoding.

A model chooses by the log-probability of whole captions, so verbosity gains nothing: both have the same number of
words. Changes, by kind:

  shape, color, size   of one object
  place                an object moves to an empty place
  binding              two objects exchange their colors
  background           another color
"""

import dataclasses

import numpy as np

from uae_jax.draws import Draws
from uae_jax.small_world.phrases import captions_text
from uae_jax.small_world.scenes import BACKGROUNDS, COLORS, SHAPES, SIZES, Scene

KINDS = ("shape", "color", "size", "place", "binding", "background")


@dataclasses.dataclass(frozen=True, eq=False)
class ForcedChoice:
  """One change of each of B scenes.

  Attributes:
    kind: one of `KINDS`.
    captions: B captions with the change.
    is_possible: bool[B], whether the scene allows the change; a binding needs two objects of different colors.
    size: int[B], index into `scenes.SIZES` of the object that is changed; -1 if it is not a change of one object.
  """

  kind: str
  captions: list[str]
  is_possible: np.ndarray
  size: np.ndarray


def forced_choices(scene: Scene, draws: Draws) -> list[ForcedChoice]:
  """A change of every kind for every scene of a batch; `draws` has one row per scene."""
  return [_choice(kind, scene, draws) for kind in KINDS]


def _choice(kind: str, scene: Scene, draws: Draws) -> ForcedChoice:
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
    fields = {name: getattr(scene, name) for name in ("shape", "color", "size", "shift")}
    moved = {name: np.where(target, value[rows, columns][:, None], value) for name, value in fields.items()}
    changed = dataclasses.replace(scene, present=(scene.present & ~chosen) | target, **moved)
  elif kind == "binding":
    differs = scene.present & (scene.color != scene.color[rows, columns][:, None])
    is_possible, size = np.any(differs, axis=-1), np.full(len(chosen), -1)
    other = _best(differs, luck)
    color = np.where(chosen, scene.color[rows, np.argmax(other, axis=-1)][:, None], scene.color)
    changed = dataclasses.replace(scene, color=np.where(other, scene.color[rows, columns][:, None], color))
  else:
    count = {"shape": len(SHAPES), "color": len(COLORS), "size": len(SIZES)}[kind]
    value = getattr(scene, kind)
    new = (value + 1 + draws.integers(count - 1)[:, None]) % count
    changed = dataclasses.replace(scene, **{kind: np.where(chosen, new, value)})
  return ForcedChoice(kind, captions_text(changed, "full"), is_possible, size)


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
  groups |= {f"_{kind}": possible & (np.array(KINDS) == kind) for kind in KINDS}
  groups |= {f"_{name}": possible & (size == i) for i, name in enumerate(SIZES)}
  return {f"forced_choice{name}": float(np.mean(is_right[group])) for name, group in groups.items() if np.any(group)}
