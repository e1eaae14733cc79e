"""Rendering of scenes to images, and detection of the scene in an image."""

import functools

import numpy as np

from uae_jax.small_world.scenes import BACKGROUNDS, IMAGE_PX, SHAPES, SIZES, VARIANTS, Scene, SceneConfig

COLOR_RGB = np.array(
  [[230, 31, 31], [31, 191, 51], [38, 77, 242], [242, 217, 26], [184, 51, 217], [247, 247, 247]], np.float32
)
BACKGROUND_RGB = np.array([[10, 10, 10], [115, 115, 115], [107, 64, 26], [13, 97, 97]], np.float32)
SIZE_SHARES = (0.45, 0.85)  # half-width of an object of each of `SIZES`, as a share of the cell's
_SUPERSAMPLING = 8


def masks(y: np.ndarray, x: np.ndarray, r: float) -> tuple[np.ndarray, ...]:
  """Which points, at offsets from the center, belong to each of `SHAPES` of half-width r: bool[...] each."""
  return (
    x**2 + y**2 < r**2,
    (np.abs(x) < 0.86 * r) & (np.abs(y) < 0.86 * r),
    (y < 0.8 * r) & (y > -r + np.abs(x) / 0.98 * 1.8),
    ((np.abs(x) < 0.34 * r) & (np.abs(y) < r)) | ((np.abs(y) < 0.34 * r) & (np.abs(x) < r)),
  )


def _alpha(config: SceneConfig) -> np.ndarray:
  """Pixel coverage float32[shapes, sizes, shifts, cell_px, cell_px] of anti-aliased objects, in [0, 1]."""
  cell = config.cell_px
  grid = (np.arange(cell * _SUPERSAMPLING) + 0.5) / _SUPERSAMPLING - cell / 2
  alpha = np.zeros((len(SHAPES), len(SIZES), config.num_shifts, cell, cell), np.float32)
  for size, share in enumerate(SIZE_SHARES):
    r = share * (cell / 2 - config.shift_px)
    for shift in range(config.num_shifts):
      dy, dx = ((shift // 3 - 1) * config.shift_px, (shift % 3 - 1) * config.shift_px) if config.shift_px else (0, 0)
      x, y = grid[None, :] - dx, grid[:, None] - dy
      for shape, mask in enumerate(masks(y, x, r)):
        alpha[shape, size, shift] = mask.reshape(cell, _SUPERSAMPLING, cell, _SUPERSAMPLING).mean((1, 3))
  return alpha


@functools.cache
def _cells(config: SceneConfig) -> np.ndarray:
  """All possible cells, uint8[backgrounds, 1 + objects, cell_px, cell_px, 3], in the order of `Scene.objects`."""
  alpha = _alpha(config)[:, None, ..., None]  # shape, color, size, shift, y, x, channel
  colors = COLOR_RGB[:, None, None, None, None]
  cells = []
  for rgb in BACKGROUND_RGB:
    filled = rgb + alpha * (colors - rgb)
    empty = np.broadcast_to(rgb, (1, *filled.shape[-3:]))
    cells.append(np.concatenate([empty, filled.reshape(-1, *filled.shape[-3:])]))
  return np.round(np.stack(cells)).astype(np.uint8)


def corners(config: SceneConfig) -> list[tuple[int, int]]:
  """The top-left pixel (y, x) of every cell; a grid of 3 leaves one pixel between cells."""
  starts = [round(i * IMAGE_PX / config.grid) for i in range(config.grid)]
  return [(y, x) for y in starts for x in starts]


def render_batch(scene: Scene) -> np.ndarray:
  """Renders a batch of scenes as uint8[B, 32, 32, 3], by copying from the table of all cells."""
  config, objects = scene.config, scene.objects()
  cells, cell = _cells(config), config.cell_px
  images = np.empty((len(objects), IMAGE_PX, IMAGE_PX, 3), np.uint8)
  if cell * config.grid < IMAGE_PX:
    images[:] = BACKGROUND_RGB.astype(np.uint8)[scene.background][:, None, None, :]
  for place, (y, x) in enumerate(corners(config)):
    images[:, y : y + cell, x : x + cell] = cells[scene.background, objects[:, place]]
  return images


def render(scene: Scene) -> np.ndarray:
  """Renders one scene as uint8[32, 32, 3]."""
  return render_batch(scene[None])[0]


def detect(images: np.ndarray, config: SceneConfig = VARIANTS["plain"]) -> tuple[np.ndarray, np.ndarray]:
  """Detects objects and background by the nearest possible cell in squared distance; exact on rendered scenes.

  Args:
    images: uint8 or float [B, 32, 32, 3] in [0, 255].
    config: size of the world.

  Returns:
    (objects int64[B, P] as `Scene.objects`, background int64[B]).
  """
  cell = config.cell_px
  bank = _cells(config).reshape(len(BACKGROUNDS), -1, cell * cell * 3).astype(np.float32)
  images = np.asarray(images, np.float32)
  seen = np.stack([images[:, y : y + cell, x : x + cell].reshape(len(images), -1) for y, x in corners(config)], 1)
  # |cell - template|^2 without |cell|^2, which is the same for all templates.
  distance = np.sum(bank**2, axis=-1) - 2.0 * np.einsum("bpc,gnc->bpgn", seen, bank, optimize=True)
  background = np.argmin(np.sum(np.min(distance, axis=-1), axis=1), axis=-1)
  chosen = np.take_along_axis(distance, background[:, None, None, None], axis=2)[:, :, 0]
  return np.argmin(chosen, axis=-1), background


def detection_accuracy(images: np.ndarray, scene: Scene) -> dict[str, float]:
  """Fractions of fully right objects, and of fully right scenes (including empty cells and the background)."""
  objects, background = detect(images, scene.config)
  is_right = objects == scene.objects()
  return {
    "object_accuracy": float(np.sum(is_right & scene.present) / np.sum(scene.present)),
    "scene_accuracy": float(np.mean(np.all(is_right, axis=-1) & (background == scene.background))),
  }
