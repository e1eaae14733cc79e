"""How well generated images follow their captions, by category, in the manner of GenEval.

single_object, two_objects   scenes with that many objects: all of them right, and none besides
counting                     the number of objects is right
position                     objects that are at their place, whatever they look like
colors, shapes, sizes        objects at their place with the right attribute; textures too, in the variant "rich"
binding                      objects with the right shape and color, in scenes where these differ between objects
relations                    the relation that the caption states holds in the picture, in the variant "rich"
"""

import numpy as np

from uae_jax.small_world import paraphrases
from uae_jax.small_world.render import detect
from uae_jax.small_world.scenes import Scene


def categories(images: np.ndarray, scene: Scene) -> dict[str, float]:
  """Shares by category; those that no scene of the batch belongs to are left out.

  Args:
    images: uint8 or float [B, side, side, 3] in 0..255.
    scene: the B scenes that the full captions describe.
  """
  objects, background = detect(images, scene.config)
  found = Scene.from_array(np.concatenate([background[:, None], objects], axis=-1), scene.config)
  count = np.sum(scene.present, axis=-1)
  is_right = np.all(objects == scene.named().objects(), axis=-1)
  is_there = found.present & scene.present
  names = ("color", "shape", "size", "texture")
  same = {name: is_there & (getattr(found, name) == getattr(scene, name)) for name in names}
  varies = np.zeros(len(count), bool)
  for name in ("shape", "color"):
    value = getattr(scene, name)
    lowest = np.min(np.where(scene.present, value, np.iinfo(np.int64).max), axis=-1)
    varies |= lowest != np.max(np.where(scene.present, value, -1), axis=-1)
  bound = scene.present & varies[:, None]
  groups = {
    "single_object": (is_right, count == 1),
    "two_objects": (is_right, count == 2),
    "counting": (np.sum(found.present, axis=-1) == count, np.ones(len(count), bool)),
    "position": (is_there, scene.present),
    "colors": (same["color"], scene.present),
    "shapes": (same["shape"], scene.present),
    "sizes": (same["size"], scene.present),
    "binding": (same["shape"] & same["color"], bound),
  }
  if scene.config.is_paraphrased:
    groups["textures"] = (same["texture"], scene.present)
    groups["relations"] = (_relations_hold(found, scene), count > 1)
  return {name: float(np.mean(right[group])) for name, (right, group) in groups.items() if np.any(group)}


def _relations_hold(found: Scene, scene: Scene) -> np.ndarray:
  """Whether the relation in the canonical caption of each scene holds in the scene that is found, bool[B]."""
  return np.array(
    [
      any(
        word in paraphrases.RELATIONS
        and paraphrases.is_true(word, words[at - 2 : at], words[at + 1 : at + 3], paraphrases.object_words(found[row]))
        for at, word in enumerate(words)
      )
      for row, words in enumerate(paraphrases.full_caption(scene[row]).split() for row in range(len(found.background)))
    ]
  )
