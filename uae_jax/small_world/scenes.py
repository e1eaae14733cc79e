"""The small world: index -> scene -> image, caption and ground truth. Pure numpy, deterministic, vectorized.

A scene is a background and objects on a grid of cells; an object has shape, color, size and, in the harder variants,
a shift within its cell. Captions name the place first, so that a causal language model knows it when it reads the
rest:

  black background ; top-left large green cross ; bottom-right small white triangle ;

Splits are disjoint by construction:
  train            no scene of the two below
  held_out         scenes whose linear hash is 0 modulo 8
  held_out_pairs   scenes with a shape-color pair that training never shows: a red cross, a blue triangle
"""

import dataclasses
import functools

import numpy as np

from uae_jax.draws import Draws

IMAGE_PX = 32
NUM_SCENES = 2**30  # a split; grain shuffles with 32-bit indices

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = ("red", "green", "blue", "yellow", "purple", "white")
SIZES = ("small", "large")
BACKGROUNDS = ("black", "gray", "brown", "teal")
PLACES = {
  2: ("top-left", "top-right", "bottom-left", "bottom-right"),
  3: ("top-left", "top", "top-right", "left", "center", "right", "bottom-left", "bottom", "bottom-right"),
}
SHIFTS_X = ("shifted-left", "", "shifted-right")
SHIFTS_Y = ("shifted-up", "", "shifted-down")
SEPARATOR = ";"
BACKGROUND_WORD = "background"

# Every word of every variant: one vocabulary serves them all.
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

COLOR_RGB = np.array(
  [[230, 31, 31], [31, 191, 51], [38, 77, 242], [242, 217, 26], [184, 51, 217], [247, 247, 247]], np.float32
)
BACKGROUND_RGB = np.array([[10, 10, 10], [115, 115, 115], [107, 64, 26], [13, 97, 97]], np.float32)

HELD_OUT_PAIRS = (("cross", "red"), ("triangle", "blue"))
SPLITS = ("train", "held_out", "held_out_pairs")
CAPTIONS = ("full", "partial", "mixed")
FULL_FRACTION = 0.6  # of mixed captions

_SHAPE_STRIDE = len(COLORS) * len(SIZES)
_SUPERSAMPLING = 8


@dataclasses.dataclass(frozen=True)
class SceneConfig:
  """Size of the world.

  Attributes:
    grid: cells a side, 2 or 3.
    max_objects: a scene has 1 to so many.
    shift_px: objects are moved by -shift_px, 0 or shift_px in both directions; captions name the move. 0 switches it
      off.
  """

  grid: int = 2
  max_objects: int = 4
  shift_px: int = 0

  @property
  def places(self) -> tuple[str, ...]:
    return PLACES[self.grid]

  @property
  def cell_px(self) -> int:
    return IMAGE_PX // self.grid

  @property
  def num_shifts(self) -> int:
    return 9 if self.shift_px else 1

  @property
  def max_caption_words(self) -> int:
    """Of a full caption: 3 for the background, 5 an object, 2 more where it is shifted."""
    return 3 + self.max_objects * (7 if self.shift_px else 5)


VARIANTS = {
  "plain": SceneConfig(),
  "shifted": SceneConfig(shift_px=2),
  "dense": SceneConfig(grid=3, max_objects=6),
}


def variant(name: str) -> SceneConfig:
  """The `SceneConfig` of `config.data.variant`.

  Raises:
    ValueError: unknown name.
  """
  if name not in VARIANTS:
    raise ValueError(f"data.variant = {name!r}: expected one of {', '.join(VARIANTS)}")
  return VARIANTS[name]


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
  """One scene, or a batch of them along a leading axis. P places, row by row.

  Attributes:
    config: of the world.
    present: bool[..., P].
    shape, color, size: int64[..., P], meaningful where present.
    shift: int64[..., P], 3 * y + x in 0..8 where 4 is the middle; 0 everywhere if the config has no shifts.
    background: int64[...].
  """

  config: SceneConfig
  present: np.ndarray
  shape: np.ndarray
  color: np.ndarray
  size: np.ndarray
  shift: np.ndarray
  background: np.ndarray

  def __getitem__(self, rows) -> "Scene":
    return self._map(lambda x: x[rows])

  def _map(self, function) -> "Scene":
    fields = [field.name for field in dataclasses.fields(self) if field.name != "config"]
    return dataclasses.replace(self, **{name: function(getattr(self, name)) for name in fields})

  def objects(self) -> np.ndarray:
    """int64[..., P]: 0 for an empty cell, else 1 + the number of shape, color, size and shift."""
    number = self.shape * _SHAPE_STRIDE + self.color * len(SIZES) + self.size
    return np.where(self.present, 1 + number * self.config.num_shifts + self.shift, 0)

  def identity(self) -> np.ndarray:
    """int64[...] below 2^31, so that it survives a cast to int32; equal for equal scenes."""
    base = 1 + len(SHAPES) * _SHAPE_STRIDE * self.config.num_shifts
    code = self.background
    for place in range(len(self.config.places)):
      code = (code * base + self.objects()[..., place]) % (2**31 - 1)
    return code

  def to_array(self) -> np.ndarray:
    """int32[..., 1 + P]: background, then `objects()`; the inverse of `from_array`."""
    return np.concatenate([self.background[..., None], self.objects()], axis=-1).astype(np.int32)

  @classmethod
  def from_array(cls, array: np.ndarray, config: SceneConfig) -> "Scene":
    """The scenes of int[..., 1 + P]."""
    array = np.asarray(array, np.int64)
    if array.shape[-1] != 1 + len(config.places):
      raise ValueError(f"data.variant: scenes of {array.shape[-1] - 1} places, expected {len(config.places)}")
    present = array[..., 1:] > 0
    number, shift = np.divmod(np.maximum(array[..., 1:] - 1, 0), config.num_shifts)
    number, size = np.divmod(number, len(SIZES))
    shape, color = np.divmod(number, len(COLORS))
    return cls(config, present, shape, color, size, shift, array[..., 0])


def _stack(scenes: list[Scene], axis: int) -> Scene:
  fields = [field.name for field in dataclasses.fields(Scene) if field.name != "config"]
  return Scene(scenes[0].config, **{name: np.stack([getattr(s, name) for s in scenes], axis) for name in fields})


# --- Splits -----------------------------------------------------------------------------------------------------------


def linear_hash(scene: Scene) -> np.ndarray:
  """int64[...] in 0..7. All weights are odd, so every attribute moves it."""
  weights = 2 * np.arange(len(scene.config.places)) + 1
  digits = 1 + scene.shape + 3 * scene.color + 5 * scene.size + 7 * scene.shift
  return (np.sum(np.where(scene.present, digits * weights, 0), axis=-1) + scene.background) % 8


def _is_held_out_pair(scene: Scene) -> np.ndarray:
  """bool[..., P]."""
  hit = np.zeros_like(scene.present)
  for shape, color in HELD_OUT_PAIRS:
    hit |= (scene.shape == SHAPES.index(shape)) & (scene.color == COLORS.index(color))
  return hit & scene.present


def split_of(scene: Scene) -> np.ndarray:
  """str[...], the split a scene belongs to."""
  has_pair = np.any(_is_held_out_pair(scene), axis=-1)
  return np.where(has_pair, "held_out_pairs", np.where(linear_hash(scene) == 0, "held_out", "train"))


def _into_train(scene: Scene) -> Scene:
  """The nearest training scene: held-out pairs get the next color, then a scene of hash 0 gets the next background."""
  scene = dataclasses.replace(
    scene, color=np.where(_is_held_out_pair(scene), (scene.color + 1) % len(COLORS), scene.color)
  )
  # The next background changes the hash by 1 or -3, never by 0 modulo 8.
  background = np.where(linear_hash(scene) == 0, (scene.background + 1) % len(BACKGROUNDS), scene.background)
  return dataclasses.replace(scene, background=background)


def _draw(draws: Draws, config: SceneConfig) -> Scene:
  """A scene of any split."""
  places = len(config.places)
  count = 1 + draws.integers(config.max_objects)
  rank = np.argsort(np.argsort(draws.uniform(places), axis=-1), axis=-1)
  return Scene(
    config,
    present=rank < count[..., None],
    shape=draws.integers(len(SHAPES), places),
    color=draws.integers(len(COLORS), places),
    size=draws.integers(len(SIZES), places),
    shift=draws.integers(config.num_shifts, places),
    background=draws.integers(len(BACKGROUNDS)),
  )


def scenes(indices, split: str = "train", config: SceneConfig = VARIANTS["plain"]) -> Scene:
  """The scenes of int[B] indices: a batch that does not depend on the company an index keeps.

  Raises:
    ValueError: unknown split.
  """
  if split not in SPLITS:
    raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
  indices = np.asarray(indices, np.int64)
  scene = _draw(Draws(indices, 0), config)
  if split == "train":
    return _into_train(scene)
  # Rejection: a row keeps its first draw that falls into the split.
  arrays, attempt = scene.to_array(), 0
  while True:
    missing = np.flatnonzero(split_of(Scene.from_array(arrays, config)) != split)
    if not missing.size:
      return Scene.from_array(arrays, config)
    attempt += 1
    arrays[missing] = _draw(Draws(indices[missing], attempt), config).to_array()


def scene(index: int, split: str = "train", config: SceneConfig = VARIANTS["plain"]) -> Scene:
  """One scene."""
  return scenes([index], split, config)[0]


def edit(scene: Scene, draws: Draws) -> Scene:
  """Changes one attribute of one object, adds or removes an object, or changes the background; the result is a
  training scene.

  Args:
    scene: one or a batch.
    draws: with a row a scene.
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
      for name in ("present", "shape", "color", "size", "shift")
    }
    result = dataclasses.replace(result, background=np.where(same, candidate.background, result.background), **pick)


def _edit_once(scene: Scene, draws: Draws) -> Scene:
  config = scene.config
  places = np.arange(len(config.places))
  # Of one of the objects: shape, color, size, shift. Of the scene: presence at any place, background.
  kind = draws.integers(6 if config.shift_px else 5)[..., None]
  chosen = np.argmax(np.where(scene.present, draws.uniform(len(places)), -1.0), axis=-1)[..., None] == places
  fresh = _draw(draws, config)
  shape = (scene.shape + 1 + draws.integers(len(SHAPES) - 1)[..., None]) % len(SHAPES)
  color = (scene.color + 1 + draws.integers(len(COLORS) - 1)[..., None]) % len(COLORS)
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
    size=change(scene.size, fresh.size, (2, 1 - scene.size)),
    shift=change(scene.shift, fresh.shift, (5, fresh.shift)),
    background=np.where(kind[..., 0] == 4, background, scene.background),
  )


def edit_groups(scene: Scene, draws: Draws) -> Scene:
  """Hard negatives for contrastive training: [B] -> [B, 4], the scene, two edits of it, an edit of the first edit."""
  first = edit(scene, draws)
  return _stack([scene, first, edit(scene, draws), edit(first, draws)], axis=1)


# --- Images -----------------------------------------------------------------------------------------------------------


def _alpha(config: SceneConfig) -> np.ndarray:
  """Coverage float32[shapes, sizes, shifts, cell_px, cell_px] of anti-aliased objects."""
  cell = config.cell_px
  grid = (np.arange(cell * _SUPERSAMPLING) + 0.5) / _SUPERSAMPLING - cell / 2
  alpha = np.zeros((len(SHAPES), len(SIZES), config.num_shifts, cell, cell), np.float32)
  for size, share in enumerate((0.45, 0.85)):
    r = share * (cell / 2 - config.shift_px)
    for shift in range(config.num_shifts):
      dy, dx = ((shift // 3 - 1) * config.shift_px, (shift % 3 - 1) * config.shift_px) if config.shift_px else (0, 0)
      x, y = grid[None, :] - dx, grid[:, None] - dy
      masks = (
        x**2 + y**2 < r**2,
        (np.abs(x) < 0.86 * r) & (np.abs(y) < 0.86 * r),
        (y < 0.8 * r) & (y > -r + np.abs(x) / 0.98 * 1.8),
        ((np.abs(x) < 0.34 * r) & (np.abs(y) < r)) | ((np.abs(y) < 0.34 * r) & (np.abs(x) < r)),
      )
      for shape, mask in enumerate(masks):
        alpha[shape, size, shift] = mask.reshape(cell, _SUPERSAMPLING, cell, _SUPERSAMPLING).mean((1, 3))
  return alpha


@functools.cache
def _cells(config: SceneConfig) -> np.ndarray:
  """Every cell there can be: uint8[backgrounds, 1 + objects, cell_px, cell_px, 3], in the order of `Scene.objects`."""
  alpha = _alpha(config)[:, None, ..., None]  # shape, color, size, shift, y, x, channel
  colors = COLOR_RGB[:, None, None, None, None]
  cells = []
  for rgb in BACKGROUND_RGB:
    filled = rgb + alpha * (colors - rgb)
    empty = np.broadcast_to(rgb, (1, *filled.shape[-3:]))
    cells.append(np.concatenate([empty, filled.reshape(-1, *filled.shape[-3:])]))
  return np.round(np.stack(cells)).astype(np.uint8)


def _corners(config: SceneConfig) -> list[tuple[int, int]]:
  """Top-left pixel of every cell; a grid of 3 leaves one pixel between cells."""
  starts = [round(i * IMAGE_PX / config.grid) for i in range(config.grid)]
  return [(y, x) for y in starts for x in starts]


def render_batch(scene: Scene) -> np.ndarray:
  """uint8[B, 32, 32, 3] of a batch: cells are copied from the table of all cells."""
  config, objects = scene.config, scene.objects()
  cells, cell = _cells(config), config.cell_px
  images = np.empty((len(objects), IMAGE_PX, IMAGE_PX, 3), np.uint8)
  if cell * config.grid < IMAGE_PX:
    images[:] = BACKGROUND_RGB.astype(np.uint8)[scene.background][:, None, None, :]
  for place, (y, x) in enumerate(_corners(config)):
    images[:, y : y + cell, x : x + cell] = cells[scene.background, objects[:, place]]
  return images


def render(scene: Scene) -> np.ndarray:
  """uint8[32, 32, 3] of one scene."""
  return render_batch(scene[None])[0]


def detect(images: np.ndarray, config: SceneConfig = VARIANTS["plain"]) -> tuple[np.ndarray, np.ndarray]:
  """What is on images, by the nearest possible cell in squared distance; exact on rendered scenes.

  Args:
    images: uint8 or float [B, 32, 32, 3] in 0..255.
    config: of the world.

  Returns:
    (objects int64[B, P] as `Scene.objects`, background int64[B]).
  """
  cell = config.cell_px
  bank = _cells(config).reshape(len(BACKGROUNDS), -1, cell * cell * 3).astype(np.float32)
  images = np.asarray(images, np.float32)
  seen = np.stack([images[:, y : y + cell, x : x + cell].reshape(len(images), -1) for y, x in _corners(config)], 1)
  # |cell - template|^2 without the term that is the same for all templates.
  distance = np.sum(bank**2, axis=-1) - 2.0 * np.einsum("bpc,gnc->bpgn", seen, bank, optimize=True)
  background = np.argmin(np.sum(np.min(distance, axis=-1), axis=1), axis=-1)
  chosen = np.take_along_axis(distance, background[:, None, None, None], axis=2)[:, :, 0]
  return np.argmin(chosen, axis=-1), background


def detection_accuracy(images: np.ndarray, scene: Scene) -> dict[str, float]:
  """Shares of objects that are wholly right, and of scenes (background and empty cells too)."""
  objects, background = detect(images, scene.config)
  is_right = objects == scene.objects()
  return {
    "object_accuracy": float(np.sum(is_right & scene.present) / np.sum(scene.present)),
    "scene_accuracy": float(np.mean(np.all(is_right, axis=-1) & (background == scene.background))),
  }


# --- Captions ---------------------------------------------------------------------------------------------------------


def _ids(words) -> np.ndarray:
  return np.array([_WORD_ID.get(word, 0) for word in words])


def caption_words(scene: Scene, captions: str, draws: Draws | None = None) -> tuple[np.ndarray, np.ndarray]:
  """The slots of a batch of captions, and which of them are said.

  Partial captions keep an object with a rate of U(0.25, 0.9) a caption (at least one), its place, size and color each
  with a rate of U(0.2, 0.95) a caption, the background with 0.4. A shift is said with its place.

  Args:
    scene: a batch [B].
    captions: "full", "partial" or "mixed" (full with probability 0.6).
    draws: B rows; needed unless full.

  Returns:
    (positions in `WORDS` int64[B, S], is said bool[B, S]).
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
  """The captions of a batch as text."""
  words, said = caption_words(scene, captions, draws)
  return [" ".join(WORDS[i] for i in row[keep]) for row, keep in zip(words, said, strict=True)]


def full_caption(scene: Scene) -> str:
  """Everything about one scene."""
  return captions_text(scene[None], "full")[0]


def partial_caption(scene: Scene, draws: Draws) -> str:
  """A part of what can be said about one scene, see `caption_words`; `draws` has no row axis or one row."""
  return captions_text(scene[None], "partial", draws)[0]


def attributes(scene: Scene) -> dict:
  """Ground truth of one scene for JSON: background, and of each object place, size, color, shape (and shift)."""
  config = scene.config
  objects = []
  for place in np.flatnonzero(scene.present):
    item = {
      "place": config.places[place],
      "size": SIZES[scene.size[place]],
      "color": COLORS[scene.color[place]],
      "shape": SHAPES[scene.shape[place]],
    }
    if config.shift_px:
      shift = int(scene.shift[place])
      item["shift"] = [word for word in (SHIFTS_X[shift % 3], SHIFTS_Y[shift // 3]) if word]
    objects.append(item)
  return {"background": BACKGROUNDS[int(scene.background)], "objects": objects}
