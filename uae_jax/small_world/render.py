"""Rendering of scenes to images, and detection of the scene in an image."""

import functools

import numpy as np

from uae_jax.small_world.scenes import BACKGROUNDS, COLORS, VARIANTS, Scene, SceneConfig

COLOR_RGB = np.array(
  [[230, 31, 31], [31, 191, 51], [38, 77, 242], [242, 217, 26], [184, 51, 217], [247, 247, 247]], np.float32
)
MORE_COLOR_RGB = {"orange": (240, 130, 20), "pink": (250, 150, 190), "cyan": (60, 210, 220)}
RGB = dict(zip(COLORS, COLOR_RGB, strict=True)) | {
  name: np.array(rgb, np.float32) for name, rgb in MORE_COLOR_RGB.items()
}
BACKGROUND_RGB = np.array([[10, 10, 10], [115, 115, 115], [107, 64, 26], [13, 97, 97]], np.float32)
_SUPERSAMPLING = 8


def covers(shape: str, y: np.ndarray, x: np.ndarray, r: float) -> np.ndarray:
  """Whether points bool[...] at offsets from the center, in pixels, belong to a shape of half-width r."""
  match shape:
    case "circle":
      return x**2 + y**2 < r**2
    case "square":
      return (np.abs(x) < 0.86 * r) & (np.abs(y) < 0.86 * r)
    case "triangle":
      return (y < 0.8 * r) & (y > -r + np.abs(x) / 0.98 * 1.8)
    case "cross":
      return ((np.abs(x) < 0.34 * r) & (np.abs(y) < r)) | ((np.abs(y) < 0.34 * r) & (np.abs(x) < r))
    case "diamond":
      return np.abs(x) + np.abs(y) < r
    case "ring":
      return (x**2 + y**2 < r**2) & (x**2 + y**2 > (0.55 * r) ** 2)
    case "bar":
      return (np.abs(x) < r) & (np.abs(y) < 0.3 * r)
    case _:
      raise ValueError(f"shape {shape!r} has no outline")


def textured(texture: str, shape: str, y: np.ndarray, x: np.ndarray, r: float) -> np.ndarray:
  """Opacity float32[...] of a shape: all of it, stripes of 2 px and fainter ones in turn, or a faint middle."""
  inside = covers(shape, y, x, r).astype(np.float32)
  match texture:
    case "solid":
      return inside
    case "striped":
      return inside * np.where(np.floor(x / 2) % 2 == 0, 1.0, 0.4).astype(np.float32)
    case "hollow":
      return inside * np.where(covers(shape, y, x, 0.6 * r), 0.15, 1.0).astype(np.float32)
    case _:
      raise ValueError(f"texture {texture!r} is unknown")


def _alpha(config: SceneConfig) -> np.ndarray:
  """Opacity float32[shapes, sizes, textures, shifts, cell_px, cell_px] of anti-aliased objects, in [0, 1]."""
  cell = config.cell_px
  grid = (np.arange(cell * _SUPERSAMPLING) + 0.5) / _SUPERSAMPLING - cell / 2
  kinds = (len(config.shapes), len(config.sizes), len(config.textures), config.num_shifts)
  alpha = np.zeros((*kinds, cell, cell), np.float32)
  for size, share in enumerate(config.size_shares):
    r = share * (cell / 2 - config.shift_px)
    for shift in range(config.num_shifts):
      dy, dx = ((shift // 3 - 1) * config.shift_px, (shift % 3 - 1) * config.shift_px) if config.shift_px else (0, 0)
      x, y = grid[None, :] - dx, grid[:, None] - dy
      for shape, name in enumerate(config.shapes):
        for texture, look in enumerate(config.textures):
          fine = textured(look, name, y, x, r).reshape(cell, _SUPERSAMPLING, cell, _SUPERSAMPLING)
          alpha[shape, size, texture, shift] = fine.mean((1, 3))
  return alpha


@functools.cache
def _cells(config: SceneConfig) -> np.ndarray:
  """All possible cells, uint8[backgrounds, 1 + objects, cell_px, cell_px, 3], in the order of `Scene.objects`."""
  alpha = _alpha(config)[:, None, ..., None]  # shape, color, size, texture, shift, y, x, channel
  colors = np.stack([RGB[name] for name in config.colors])[:, None, None, None, None, None]
  cells = []
  for rgb in BACKGROUND_RGB:
    filled = rgb + alpha * (colors - rgb)
    empty = np.broadcast_to(rgb, (1, *filled.shape[-3:]))
    cells.append(np.concatenate([empty, filled.reshape(-1, *filled.shape[-3:])]))
  return np.round(np.stack(cells)).astype(np.uint8)


def corners(config: SceneConfig) -> list[tuple[int, int]]:
  """The top-left pixel (y, x) of every cell; a grid of 3 leaves one pixel between cells."""
  starts = [round(i * config.image_px / config.grid) for i in range(config.grid)]
  return [(y, x) for y in starts for x in starts]


def render_batch(scene: Scene) -> np.ndarray:
  """Renders a batch of scenes as uint8[B, side, side, 3], by copying from the table of all cells."""
  config, objects = scene.config, scene.objects()
  cells, cell, side = _cells(config), config.cell_px, config.image_px
  images = np.empty((len(objects), side, side, 3), np.uint8)
  if cell * config.grid < side:
    images[:] = BACKGROUND_RGB.astype(np.uint8)[scene.background][:, None, None, :]
  for place, (y, x) in enumerate(corners(config)):
    images[:, y : y + cell, x : x + cell] = cells[scene.background, objects[:, place]]
  return images


def render(scene: Scene) -> np.ndarray:
  """Renders one scene as uint8[side, side, 3]."""
  return render_batch(scene[None])[0]


def detect(images: np.ndarray, config: SceneConfig = VARIANTS["plain"]) -> tuple[np.ndarray, np.ndarray]:
  """Detects objects and background by the nearest possible cell in squared distance; exact on rendered scenes.

  Args:
    images: uint8 or float [B, side, side, 3] in [0, 255].
    config: size of the world.

  Returns:
    (objects int64[B, P] as `Scene.objects` of `Scene.named`, background int64[B]).
  """
  # The table of distances to all possible cells has 10 MB per image in the largest world.
  blocks = [_detect_block(np.asarray(images[i : i + 64], np.float32), config) for i in range(0, len(images), 64)]
  objects, background = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
  if not config.names_shift:
    objects = np.where(objects > 0, objects - (objects - 1) % config.num_shifts, 0)
  return objects, background


def _detect_block(images: np.ndarray, config: SceneConfig) -> tuple[np.ndarray, np.ndarray]:
  """(objects with shifts int64[b, P], background int64[b]) of images float32[b, side, side, 3]."""
  cell = config.cell_px
  bank = _cells(config).reshape(len(BACKGROUNDS), -1, cell * cell * 3).astype(np.float32)
  seen = np.stack([images[:, y : y + cell, x : x + cell].reshape(len(images), -1) for y, x in corners(config)], 1)
  # |cell - template|^2 without |cell|^2, which is the same for all templates.
  distance = np.sum(bank**2, axis=-1) - 2.0 * np.einsum("bpc,gnc->bpgn", seen, bank, optimize=True)
  background = np.argmin(np.sum(np.min(distance, axis=-1), axis=1), axis=-1)
  chosen = np.take_along_axis(distance, background[:, None, None, None], axis=2)[:, :, 0]
  return np.argmin(chosen, axis=-1), background


def detection_accuracy(images: np.ndarray, scene: Scene) -> dict[str, float]:
  """Fractions of fully right objects, and of fully right scenes (including empty cells and the background)."""
  objects, background = detect(images, scene.config)
  is_right = objects == scene.named().objects()
  return {
    "object_accuracy": float(np.sum(is_right & scene.present) / np.sum(scene.present)),
    "scene_accuracy": float(np.mean(np.all(is_right, axis=-1) & (background == scene.background))),
  }
