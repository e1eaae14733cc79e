"""The vision tower of Qwen2.5-VL: maps the patches of images of one size to tokens for the language model.

Source: Bai et al. 2025 (arXiv 2502.13923); transformers 5.23 modeling_qwen2_5_vl.py,
Qwen2_5_VisionTransformerPretrainedModel.

Terms: a *patch* is a square of `patch_size` pixels per side; a *cell* is a square of `spatial_merge` x `spatial_merge`
patches, which the merger maps to one token; a *window* is a square of cells, smaller at the right and bottom edges.
Patches are ordered cell by cell, cells row by row. T is the number of patches, F the features of the reordered array.

Difference from transformers: all images of a batch share one static grid. Inside the tower cells are ordered window by
window, with windows of equal shape adjacent, so window attention is a reshape and needs neither mask nor gather.
"""

from collections.abc import Mapping
import dataclasses
import functools
import itertools
from typing import Any

import einops
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from uae_jax.layers import rope
from uae_jax.layers.attention import attend
from uae_jax.layers.lora import Linear
from uae_jax.layers.mlp import GatedMLP
from uae_jax.layers.norms import RMSNorm
from uae_jax.layers.stack import scan_layers, stack
from uae_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """Architecture of the vision tower; the defaults are common to all published sizes.

  Attributes:
    depth: number of blocks.
    width: D.
    num_heads: N.
    mlp_width: hidden width of the gated MLP.
    out_width: width of the tokens for the language model.
    patch_size: side of a patch, in pixels.
    spatial_merge: side of a cell, in patches.
    window_px: side of a window, in pixels.
    full_attention_layers: indices of blocks that attend over the whole image instead of windows.
    temporal_patch: frames per patch; a still image is repeated `temporal_patch` times.
    in_channels: channels of the images.
    norm_eps: epsilon of every norm.
    rope_theta: base of the rotary frequencies.
    image_mean: channel means of pixels in [0, 1], for `normalize`.
    image_std: channel standard deviations of pixels in [0, 1], for `normalize`.
    remat: a key of `layers.stack.REMAT_POLICIES`.
    unroll: unroll the layers instead of scanning them.
  """

  depth: int
  width: int
  num_heads: int
  mlp_width: int
  out_width: int
  patch_size: int = 14
  spatial_merge: int = 2
  window_px: int = 112
  full_attention_layers: tuple[int, ...] = ()
  temporal_patch: int = 2
  in_channels: int = 3
  norm_eps: float = 1e-6
  rope_theta: float = 1e4
  image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
  image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
  remat: str = "none"
  unroll: bool = False

  def __post_init__(self):
    if self.width % self.num_heads or self.head_width % 4:
      raise ValueError(f"width {self.width} / num_heads {self.num_heads} must be a multiple of 4 for the rotary angles")
    if self.window_cells < 1:
      raise ValueError(
        f"window_px {self.window_px} is less than a cell of {self.patch_size * self.spatial_merge} pixels"
      )
    if not set(self.full_attention_layers) <= set(range(self.depth)):
      raise ValueError(f"full_attention_layers {self.full_attention_layers} exceed depth {self.depth}")

  @property
  def head_width(self) -> int:
    return self.width // self.num_heads

  @property
  def cell_patches(self) -> int:
    """Number of patches per cell."""
    return self.spatial_merge**2

  @property
  def patch_values(self) -> int:
    """Number of values per patch."""
    return self.in_channels * self.temporal_patch * self.patch_size**2

  @property
  def window_cells(self) -> int:
    """Side of a window, in cells."""
    return self.window_px // self.spatial_merge // self.patch_size

  @classmethod
  def qwen25_vl(cls, out_width: int) -> "VisionConfig":
    """Source: `vision_config` in the config.json of Qwen/Qwen2.5-VL-3B-Instruct; sizes differ only in `out_width`."""
    return cls(
      depth=32,
      width=1280,
      num_heads=16,
      mlp_width=3420,
      out_width=out_width,
      full_attention_layers=(7, 15, 23, 31),
    )

  @classmethod
  def from_huggingface(cls, config: Mapping[str, Any]) -> "VisionConfig":
    """Reads `vision_config` of a `config.json`; absent fields get the defaults of transformers.

    Raises:
      ValueError: the file describes an unsupported architecture.
    """
    if config.get("hidden_act", "silu") != "silu":
      raise ValueError(f"vision_config.hidden_act {config['hidden_act']!r} is not known; expected 'silu'")
    rope_parameters = config.get("rope_parameters") or {}
    return cls(
      depth=config.get("depth", 32),
      width=config["hidden_size"],
      num_heads=config.get("num_heads", 16),
      mlp_width=config.get("intermediate_size", 3420),
      out_width=config["out_hidden_size"],
      patch_size=config.get("patch_size", 14),
      spatial_merge=config.get("spatial_merge_size", 2),
      window_px=config.get("window_size", 112),
      full_attention_layers=tuple(config.get("fullatt_block_indexes", (7, 15, 23, 31))),
      temporal_patch=config.get("temporal_patch_size", 2),
      in_channels=config.get("in_channels", config.get("in_chans", 3)),
      rope_theta=rope_parameters.get("rope_theta", 1e4),
    )


def normalize(images: jax.Array, config: VisionConfig) -> jax.Array:
  """Normalizes pixels with the tower's mean and standard deviation: uint8[B, H, W, C] -> float32[B, H, W, C]."""
  mean, std = (np.asarray(values, np.float32) for values in (config.image_mean, config.image_std))
  return (jnp.asarray(images).astype(jnp.float32) * np.float32(1 / 255) - mean) / std


def patchify(pixels: jax.Array, config: VisionConfig) -> jax.Array:
  """Splits images into flat patches, cell by cell; the values are ordered channel, frame, row, column.

  Args:
    pixels: float[B, H, W, C]; sides are multiples of a cell.

  Returns:
    float[B, T, C * temporal_patch * patch_size ** 2].

  Raises:
    ValueError: a side does not divide into cells.
  """
  side = config.patch_size * config.spatial_merge
  if pixels.shape[1] % side or pixels.shape[2] % side:
    raise ValueError(f"images of {pixels.shape[1:3]} pixels do not divide into cells of {side}")
  sizes = {"m": config.spatial_merge, "n": config.spatial_merge, "p": config.patch_size, "q": config.patch_size}
  patches = einops.rearrange(pixels, "b (h m p) (w n q) c -> b (h w m n) c 1 (p q)", **sizes)
  frames = (*patches.shape[:3], config.temporal_patch, patches.shape[-1])
  return jnp.broadcast_to(patches, frames).reshape(*patches.shape[:2], -1)


@dataclasses.dataclass(frozen=True)
class Band:
  """Windows of equal length along one side of the image: `count` windows of `cells` cells, starting at cell `start`."""

  start: int
  count: int
  cells: int

  @property
  def extent(self) -> slice:
    return slice(self.start, self.start + self.count * self.cells)


def bands(side: int, window: int) -> tuple[Band, ...]:
  """The bands of a side of `side` cells: full windows first, then the remainder at the edge."""
  whole, rest = divmod(side, window)
  found = (Band(0, whole, window), Band(whole * window, 1, rest))
  return tuple(band for band in found if band.count and band.cells)


@dataclasses.dataclass(frozen=True)
class Windows:
  """The windows of a grid of cells, of at most four kinds: inner, right edge, bottom edge and corner.

  Attributes:
    rows: bands along the height.
    columns: bands along the width.
  """

  rows: tuple[Band, ...]
  columns: tuple[Band, ...]

  @classmethod
  def of(cls, height: int, width: int, window: int) -> "Windows":
    """The windows of a grid of height x width cells."""
    return cls(bands(height, window), bands(width, window))

  @property
  def kinds(self) -> list[tuple[int, int]]:
    """(number of windows, cells per window) of each kind, in window order."""
    return [(r.count * c.count, r.cells * c.cells) for r, c in itertools.product(self.rows, self.columns)]

  def order(self, x):
    """Reorders cells from raster to window order: [B, height, width, F] -> [B, cells, F]; NumPy or JAX."""
    parts = [
      einops.rearrange(x[:, r.extent, c.extent], "b (i r) (j c) f -> b (i j r c) f", r=r.cells, c=c.cells)
      for r, c in itertools.product(self.rows, self.columns)
    ]
    return parts[0] if len(parts) == 1 else (np if isinstance(x, np.ndarray) else jnp).concatenate(parts, axis=1)

  def restore(self, x: jax.Array) -> jax.Array:
    """Reorders cells from window to raster order, [B, cells, F] -> [B, cells, F]; the inverse of `order`."""
    strips, start = [], 0
    for r in self.rows:
      strip = []
      for c in self.columns:
        stop = start + r.count * r.cells * c.count * c.cells
        sizes = {"i": r.count, "j": c.count, "r": r.cells, "c": c.cells}
        strip.append(einops.rearrange(x[:, start:stop], "b (i j r c) f -> b (i r) (j c) f", **sizes))
        start = stop
      strips.append(jnp.concatenate(strip, axis=2).reshape(x.shape[0], -1, x.shape[2]))
    return jnp.concatenate(strips, axis=1)

  def attend(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention within each window: three float[B, T, N, H] in window order -> float[B, T, N, H]."""
    patches_per_cell = q.shape[1] // sum(count * cells for count, cells in self.kinds)
    parts, start = [], 0
    for count, cells in self.kinds:
      stop = start + count * cells * patches_per_cell
      shape = (q.shape[0] * count, cells * patches_per_cell, *q.shape[2:])
      part = attend(*(x[:, start:stop].reshape(shape) for x in (q, k, v)))
      parts.append(part.reshape(q.shape[0], -1, *q.shape[2:]))
      start = stop
    return jnp.concatenate(parts, axis=1)


class Attention(nnx.Module):
  """Multi-head attention with rotary positions; the caller's `attend` determines which keys a query sees."""

  def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
    self.qkv = Linear(config.width, 3 * config.width, axes=("embed", "heads"), rngs=rngs)
    self.out = Linear(config.width, config.width, axes=("heads", "embed"), rngs=rngs)
    self.config = config

  def __call__(self, x: jax.Array, rotation, attend) -> jax.Array:
    heads = (*x.shape[:2], self.config.num_heads, self.config.head_width)
    q, k, v = (
      constrain(part.reshape(heads), "batch", "act_tokens", "act_heads", None)
      for part in jnp.split(self.qkv(x), 3, axis=-1)
    )
    return self.out(attend(rope.rotate(q, rotation), rope.rotate(k, rotation), v).reshape(x.shape))


class Block(nnx.Module):
  """One transformer block: float[B, T, D] -> float[B, T, D]."""

  def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
    self.attention_norm = RMSNorm(config.width, eps=config.norm_eps)
    self.attention = Attention(config, rngs=rngs)
    self.mlp_norm = RMSNorm(config.width, eps=config.norm_eps)
    self.mlp = GatedMLP(config.width, config.mlp_width, use_bias=True, rngs=rngs)

  def __call__(self, x: jax.Array, rotation, attend) -> jax.Array:
    x = x + self.attention(self.attention_norm(x), rotation, attend)
    x = x + self.mlp(self.mlp_norm(x))
    return constrain(x, "batch", "act_tokens", "act_embed")


class Merger(nnx.Module):
  """Merges the patches of a cell into one token: float[B, T, D] -> float[B, T / cell_patches, out_width]."""

  def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
    width = config.width * config.cell_patches
    self.norm = RMSNorm(config.width, eps=config.norm_eps)
    self.up = Linear(width, width, axes=("embed", "mlp"), rngs=rngs)
    self.down = Linear(width, config.out_width, axes=("mlp", "embed"), rngs=rngs)
    self.cell_patches = config.cell_patches

  def __call__(self, x: jax.Array) -> jax.Array:
    cells = self.norm(x).reshape(x.shape[0], x.shape[1] // self.cell_patches, -1)
    hidden = constrain(jax.nn.gelu(self.up(cells), approximate=False), "batch", "act_tokens", "act_mlp")
    return constrain(self.down(hidden), "batch", "act_tokens", "act_embed")


class VisionTower(nnx.Module):
  """The complete tower, from patches to image tokens."""

  def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
    self.patch_embed = Linear(config.patch_values, config.width, axes=("patch", "embed"), use_bias=False, rngs=rngs)
    self.layers = stack(lambda r: Block(config, rngs=r), config.depth, rngs)
    self.merger = Merger(config, rngs=rngs)
    self.config = config

  def __call__(self, patches: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Image tokens for the language model. Computes in the dtype of `patches`.

    Args:
      patches: float[B, T, patch_values], as returned by `patchify`.
      grid: static (rows, columns) of patches, the same for every image.

    Returns:
      float[B, T / cell_patches, out_width], cells in raster order.

    Raises:
      ValueError: the patches do not match the grid, or the grid does not divide into cells.
    """
    config, batch = self.config, patches.shape[0]
    if any(side % config.spatial_merge for side in grid) or patches.shape[1:] != (
      grid[0] * grid[1],
      config.patch_values,
    ):
      raise ValueError(
        f"patches of shape {patches.shape} are not those of a grid of {grid}, {config.patch_values} values each"
      )
    height, width = (side // config.spatial_merge for side in grid)
    windows = Windows.of(height, width, config.window_cells)
    cells = windows.order(patches.reshape(batch, height, width, -1))
    x = self.patch_embed(cells.reshape(patches.shape))
    x = constrain(x, "batch", "act_tokens", "act_embed")
    cos_sin = rope.rotation(self.angles(grid, windows))

    is_full = np.isin(np.arange(config.depth), config.full_attention_layers)

    def body(x, block, is_full):
      either = functools.partial(jax.lax.cond, is_full, attend, windows.attend)
      return block(x, cos_sin, either), None

    x, _ = scan_layers(body, x, self.layers, is_full, remat=config.remat, unroll=config.unroll or 1)
    return windows.restore(self.merger(x))

  def angles(self, grid: tuple[int, int], windows: Windows) -> np.ndarray:
    """Rotary angles of every patch, in window order: float32[T, H / 2]."""
    config, merge = self.config, self.config.spatial_merge
    height, width = grid[0] // merge, grid[1] // merge
    places = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), axis=-1)
    cells = einops.rearrange(places, "(h m) (w n) a -> 1 h w (m n a)", m=merge, n=merge, h=height, w=width)
    rows, columns = windows.order(cells).reshape(-1, 2).T
    return rope.axial_angles(rows, columns, config.head_width, config.rope_theta)
