"""Scenes of the small world by index: attributes, splits and edits, in deterministic, vectorized NumPy.

A scene is a background and objects on a grid of cells. An object has a shape, a color and a size, in the variant
"shifted" a shift within its cell, and in the variant "rich" a shift and a texture. `render.py` makes images of scenes,
`phrases.py` and `paraphrases.py` captions.

Splits are disjoint by construction:
  train            all scenes that are in neither of the splits below
  held_out         scenes whose linear hash is 0 modulo 8, without the pairs below
  held_out_pairs   scenes with a shape-color pair that never occurs in training: a red cross, a blue triangle
"""

import dataclasses

import numpy as np

from uae_jax.draws import Draws

IMAGE_PX = 32
NUM_SCENES = 2**30  # Per split; grain shuffles with 32-bit indices.

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = ("red", "green", "blue", "yellow", "purple", "white")
SIZES = ("small", "large")
BACKGROUNDS = ("black", "gray", "brown", "teal")
PLACES = {
  2: ("top-left", "top-right", "bottom-left", "bottom-right"),
  3: ("top-left", "top", "top-right", "left", "center", "right", "bottom-left", "bottom", "bottom-right"),
}

HELD_OUT_PAIRS = (("cross", "red"), ("triangle", "blue"))
SPLITS = ("train", "held_out", "held_out_pairs")
MAX_PARAPHRASED_WORDS = 60  # longest caption of `paraphrases.py`


@dataclasses.dataclass(frozen=True)
class SceneConfig:
  """Size of the world.

  Attributes:
    grid: cells per side, 2 or 3.
    max_objects: maximum number of objects of a scene; the minimum is 1.
    shift_px: objects are shifted by -shift_px, 0 or shift_px pixels along each axis; 0 disables shifts.
    image_px: side of the square images, in pixels.
    shapes, colors, sizes, textures: words of the attributes of objects.
    size_shares: half-width of an object of each size, as a share of the room that shifts leave in its cell.
    is_paraphrased: captions come from the grammar of `paraphrases.py`, which does not name shifts.
  """

  grid: int = 2
  max_objects: int = 4
  shift_px: int = 0
  image_px: int = IMAGE_PX
  shapes: tuple[str, ...] = SHAPES
  colors: tuple[str, ...] = COLORS
  sizes: tuple[str, ...] = SIZES
  textures: tuple[str, ...] = ("solid",)
  size_shares: tuple[float, ...] = (0.45, 0.85)
  is_paraphrased: bool = False

  @property
  def places(self) -> tuple[str, ...]:
    return PLACES[self.grid]

  @property
  def cell_px(self) -> int:
    return self.image_px // self.grid

  @property
  def num_shifts(self) -> int:
    return 9 if self.shift_px else 1

  @property
  def num_objects(self) -> int:
    """Number of different objects, shifts included."""
    return len(self.shapes) * len(self.colors) * len(self.sizes) * len(self.textures) * self.num_shifts

  @property
  def names_shift(self) -> bool:
    return self.shift_px > 0 and not self.is_paraphrased

  @property
  def max_caption_words(self) -> int:
    """Maximum number of words of a full caption: 3 for the background, 5 per object, 2 more per shifted object.

    Captions of the paraphrasing grammar have up to 60.
    """
    if self.is_paraphrased:
      return MAX_PARAPHRASED_WORDS
    return 3 + self.max_objects * (7 if self.shift_px else 5)


VARIANTS = {
  "plain": SceneConfig(),
  "shifted": SceneConfig(shift_px=2),
  "dense": SceneConfig(grid=3, max_objects=6),
  "rich": SceneConfig(
    grid=3,
    max_objects=6,
    shift_px=2,
    image_px=48,
    shapes=(*SHAPES, "diamond", "bar"),
    colors=(*COLORS, "orange", "pink"),
    sizes=("small", "medium", "large"),
    textures=("solid", "striped", "hollow"),
    size_shares=(0.55, 0.77, 1.0),
    is_paraphrased=True,
  ),
}


def variant(name: str) -> SceneConfig:
  """The `SceneConfig` for `config.data.variant`.

  Raises:
    ValueError: `name` is not in `VARIANTS`.
  """
  if name not in VARIANTS:
    raise ValueError(f"data.variant = {name!r}: expected one of {', '.join(VARIANTS)}")
  return VARIANTS[name]


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
  """One scene, or a batch of scenes along a leading axis, with P places in raster order.

  Attributes:
    config: size of the world.
    present: bool[..., P], whether there is an object at the place.
    shape, color, size, texture: int64[..., P], indices into the words of the config; meaningful where `present`.
    shift: int64[..., P], 3 * y + x in [0, 8], where 4 is the middle; 0 everywhere if the config has no shifts.
    background: int64[...], index into `BACKGROUNDS`.
  """

  config: SceneConfig
  present: np.ndarray
  shape: np.ndarray
  color: np.ndarray
  size: np.ndarray
  texture: np.ndarray
  shift: np.ndarray
  background: np.ndarray

  def __getitem__(self, rows) -> "Scene":
    return self._map(lambda x: x[rows])

  def _map(self, function) -> "Scene":
    fields = [field.name for field in dataclasses.fields(self) if field.name != "config"]
    return dataclasses.replace(self, **{name: function(getattr(self, name)) for name in fields})

  def objects(self) -> np.ndarray:
    """Objects as numbers int64[..., P]: 0 for an empty cell, else 1 + the index of all attributes of the object."""
    config = self.config
    number = (self.shape * len(config.colors) + self.color) * len(config.sizes) + self.size
    number = number * len(config.textures) + self.texture
    return np.where(self.present, 1 + number * self.config.num_shifts + self.shift, 0)

  def named(self) -> "Scene":
    """The scene without what captions do not name: shifts are 0 if the config does not name them."""
    return self if self.config.names_shift else dataclasses.replace(self, shift=np.zeros_like(self.shift))

  def identity(self) -> np.ndarray:
    """A hash of the scene, int64[...] below 2^31 so that it fits in int32; equal for equal scenes."""
    base = 1 + self.config.num_objects
    code = self.background
    for place in range(len(self.config.places)):
      code = (code * base + self.objects()[..., place]) % (2**31 - 1)
    return code

  def to_array(self) -> np.ndarray:
    """The scene as int32[..., 1 + P]: the background, then `objects()`; the inverse of `from_array`."""
    return np.concatenate([self.background[..., None], self.objects()], axis=-1).astype(np.int32)

  @classmethod
  def from_array(cls, array: np.ndarray, config: SceneConfig) -> "Scene":
    """Scenes from int[..., 1 + P]; the inverse of `to_array`."""
    array = np.asarray(array, np.int64)
    if array.shape[-1] != 1 + len(config.places):
      raise ValueError(f"data.variant: scenes of {array.shape[-1] - 1} places, expected {len(config.places)}")
    present = array[..., 1:] > 0
    number, shift = np.divmod(np.maximum(array[..., 1:] - 1, 0), config.num_shifts)
    number, texture = np.divmod(number, len(config.textures))
    number, size = np.divmod(number, len(config.sizes))
    shape, color = np.divmod(number, len(config.colors))
    return cls(config, present, shape, color, size, texture, shift, array[..., 0])


def _stack(scenes: list[Scene], axis: int) -> Scene:
  fields = [field.name for field in dataclasses.fields(Scene) if field.name != "config"]
  return Scene(scenes[0].config, **{name: np.stack([getattr(s, name) for s in scenes], axis) for name in fields})


# --- Splits -----------------------------------------------------------------------------------------------------------


def linear_hash(scene: Scene) -> np.ndarray:
  """A linear hash int64[...] in [0, 7]; all weights are odd, so it depends on every attribute."""
  weights = 2 * np.arange(len(scene.config.places)) + 1
  digits = 1 + scene.shape + 3 * scene.color + 5 * scene.size + 7 * scene.shift + 9 * scene.texture
  return (np.sum(np.where(scene.present, digits * weights, 0), axis=-1) + scene.background) % 8


def _is_held_out_pair(scene: Scene) -> np.ndarray:
  """Whether the object at each place is a held-out shape-color pair, bool[..., P]."""
  hit = np.zeros_like(scene.present)
  for shape, color in HELD_OUT_PAIRS:
    hit |= (scene.shape == scene.config.shapes.index(shape)) & (scene.color == scene.config.colors.index(color))
  return hit & scene.present


def split_of(scene: Scene) -> np.ndarray:
  """The split that a scene belongs to, str[...]."""
  has_pair = np.any(_is_held_out_pair(scene), axis=-1)
  return np.where(has_pair, "held_out_pairs", np.where(linear_hash(scene) == 0, "held_out", "train"))


def _into_train(scene: Scene) -> Scene:
  """Moves a scene into the training split: held-out pairs get the next color, then hash 0 the next background."""
  scene = dataclasses.replace(
    scene, color=np.where(_is_held_out_pair(scene), (scene.color + 1) % len(scene.config.colors), scene.color)
  )
  # The next background changes the hash by 1 or -3, never by 0 modulo 8.
  background = np.where(linear_hash(scene) == 0, (scene.background + 1) % len(BACKGROUNDS), scene.background)
  return dataclasses.replace(scene, background=background)


def _draw(draws: Draws, config: SceneConfig) -> Scene:
  """Draws scenes of any split."""
  places = len(config.places)
  count = 1 + draws.integers(config.max_objects)
  rank = np.argsort(np.argsort(draws.uniform(places), axis=-1), axis=-1)
  drawn = Scene(
    config,
    present=rank < count[..., None],
    shape=draws.integers(len(config.shapes), places),
    color=draws.integers(len(config.colors), places),
    size=draws.integers(len(config.sizes), places),
    texture=np.zeros_like(rank),
    shift=draws.integers(config.num_shifts, places),
    background=draws.integers(len(BACKGROUNDS)),
  )
  # A world with one texture draws nothing more, so its scenes do not depend on there being textures elsewhere.
  if len(config.textures) == 1:
    return drawn
  return dataclasses.replace(drawn, texture=draws.integers(len(config.textures), places))


def scenes(indices, split: str = "train", config: SceneConfig = VARIANTS["plain"]) -> Scene:
  """The scenes at indices int[B]; a scene does not depend on the other indices of the batch.

  Raises:
    ValueError: `split` is not in `SPLITS`.
  """
  if split not in SPLITS:
    raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
  indices = np.asarray(indices, np.int64)
  scene = _draw(Draws(indices, 0), config)
  if split == "train":
    return _into_train(scene)
  # Rejection sampling: each row keeps its first draw that falls into the split.
  arrays, attempt = scene.to_array(), 0
  while True:
    missing = np.flatnonzero(split_of(Scene.from_array(arrays, config)) != split)
    if not missing.size:
      return Scene.from_array(arrays, config)
    attempt += 1
    arrays[missing] = _draw(Draws(indices[missing], attempt), config).to_array()


def scene(index: int, split: str = "train", config: SceneConfig = VARIANTS["plain"]) -> Scene:
  """The scene at one index; arguments as for `scenes`."""
  return scenes([index], split, config)[0]


def edit(scene: Scene, draws: Draws) -> Scene:
  """Edits one attribute of an object, the presence of an object, or the background; returns a training scene.

  Args:
    scene: one scene or a batch.
    draws: one row per scene.
  """
  stream = draws.fork()
  result = scene
  while True:
    same = result.identity() == scene.identity()
    if not np.any(same):
      return result
    candidate = _into_train(_edit_once(scene, stream))
    pick = {
      name: np.where(same[..., None], getattr(candidate, name), getattr(result, name))
      for name in ("present", "shape", "color", "size", "texture", "shift")
    }
    result = dataclasses.replace(result, background=np.where(same, candidate.background, result.background), **pick)


def _edit_once(scene: Scene, draws: Draws) -> Scene:
  config = scene.config
  places = np.arange(len(config.places))
  # 0, 1, 2, 5, 6: shape, color, size, shift, texture of one object; 3: presence at any place; 4: background.
  kinds = (0, 1, 2, 3, 4) + ((5,) if config.shift_px else ()) + ((6,) if len(config.textures) > 1 else ())
  kind = np.array(kinds)[draws.integers(len(kinds))][..., None]
  chosen = np.argmax(np.where(scene.present, draws.uniform(len(places)), -1.0), axis=-1)[..., None] == places
  fresh = _draw(draws, config)

  def other(name: str, count: int) -> np.ndarray:
    return (getattr(scene, name) + 1 + draws.integers(count - 1)[..., None]) % count

  shape, color = other("shape", len(config.shapes)), other("color", len(config.colors))
  size = other("size", len(config.sizes)) if len(config.sizes) > 2 else 1 - scene.size
  texture = other("texture", len(config.textures)) if len(config.textures) > 1 else scene.texture
  toggled = (draws.integers(len(places))[..., None] == places) & (kind == 3)
  present = scene.present ^ toggled
  count = np.sum(present, axis=-1, keepdims=True)
  present = np.where((count >= 1) & (count <= config.max_objects), present, scene.present)
  is_new = present & ~scene.present
  background = (scene.background + 1 + draws.integers(len(BACKGROUNDS) - 1)) % len(BACKGROUNDS)

  def change(old, new, which):
    return np.where(is_new, new, np.where(chosen & (kind == which[0]), which[1], old))

  return Scene(
    config,
    present=present,
    shape=change(scene.shape, fresh.shape, (0, shape)),
    color=change(scene.color, fresh.color, (1, color)),
    size=change(scene.size, fresh.size, (2, size)),
    texture=change(scene.texture, fresh.texture, (6, texture)),
    shift=change(scene.shift, fresh.shift, (5, fresh.shift)),
    background=np.where(kind[..., 0] == 4, background, scene.background),
  )


def edit_groups(scene: Scene, draws: Draws) -> Scene:
  """Hard negatives for contrastive training, [B] -> [B, 4]: a scene, two edits of it, an edit of the first edit."""
  first = edit(scene, draws)
  return _stack([scene, first, edit(scene, draws), edit(first, draws)], axis=1)
