"""Differentiable image resizing that matches torch's `interpolate`, as two small matrix products.

`jax.image.resize(method="cubic")` uses another filter (a = -0.5, always antialiased): torch's bicubic has a = -0.75
and antialiases only on request. Source: torch 2.13 aten UpSampleKernel.cpp, `align_corners=False`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def cubic(distance: np.ndarray, a: float) -> np.ndarray:
  """Keys' cubic kernel."""
  x = np.abs(distance)
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
  return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def triangle(distance: np.ndarray) -> np.ndarray:
  return np.maximum(0.0, 1 - np.abs(distance))


@functools.lru_cache(maxsize=256)
def matrix(source: int, target: int, method: str, antialias: bool) -> np.ndarray:
  """Resampling weights float32[target, source] of one axis.

  Args:
    source: length before resizing, pixels.
    target: length after resizing, pixels.
    method: "bicubic" or "bilinear".
    antialias: widen the kernel when shrinking and renormalize at the borders; torch's antialiased cubic has a = -0.5.
  """
  if method not in ("bicubic", "bilinear"):
    raise ValueError(f"resize method {method!r} is not known; expected 'bicubic' or 'bilinear'")
  radius = 2 if method == "bicubic" else 1
  # Positions in float32, rounded where torch rounds: in a large image the difference would show in the weights.
  ratio = np.float32(source) / np.float32(target)
  places = np.arange(target, dtype=np.float32) + np.float32(0.5)
  if antialias:
    centers = places * ratio
    distance = np.arange(source, dtype=np.float32) - centers[:, None] + np.float32(0.5)
    distance = distance / max(ratio, np.float32(1))
    weights = cubic(distance, -0.5) if method == "bicubic" else triangle(distance)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
  # Torch uses a fused multiply-add here, which rounds once.
  centers = (places.astype(np.float64) * ratio - 0.5).astype(np.float32)
  first = np.floor(centers).astype(int) - radius + 1
  weights = np.zeros((target, source), np.float32)
  for i in range(2 * radius):
    distance = centers - (first + i).astype(np.float32)
    value = cubic(distance, -0.75) if method == "bicubic" else triangle(distance)
    # Samples outside the image repeat the border pixel.
    np.add.at(weights, (np.arange(target), np.clip(first + i, 0, source - 1)), value)
  return weights


def resize(x: jax.Array, height: int, width: int, *, method: str = "bicubic", antialias: bool = False) -> jax.Array:
  """float[B, H, W, C] -> float[B, height, width, C], in float32; the identity if the size is already right."""
  if x.shape[1:3] == (height, width):
    return x
  rows = matrix(x.shape[1], height, method, antialias)
  columns = matrix(x.shape[2], width, method, antialias)
  y = jnp.einsum("bhwc,yh->bywc", x.astype(jnp.float32), rows, precision="highest")
  return jnp.einsum("bywc,xw->byxc", y, columns, precision="highest").astype(x.dtype)
