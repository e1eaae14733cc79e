"""Rotary position embeddings: angles from positions, and the rotation of queries and keys.

Feature i is paired with feature i + H / 2 ("rotate half"). Angles and rotation are float32 regardless of the dtype of
the activations: bfloat16 rounds position 257 to 256.

Source: Su et al. 2021 (arXiv 2104.09864); transformers 5.23 modeling_qwen2_5_vl.py.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def frequencies(width: int, theta: float) -> np.ndarray:
  """float32[width / 2]: theta ** (-2 i / width)."""
  exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
  return np.float32(1) / np.float32(theta) ** exponents


def axial_angles(rows: np.ndarray, columns: np.ndarray, head_width: int, theta: float) -> np.ndarray:
  """Angles of image positions: half of the feature pairs rotate with the row, half with the column.

  Args:
    rows: int[T], row of each token.
    columns: int[T], column of each token.
    head_width: H, a multiple of 4.
    theta: base of the frequencies.

  Returns:
    float32[T, H / 2].
  """
  places = np.stack([rows, columns], axis=-1).astype(np.float32)
  return (places[..., None] * frequencies(head_width // 2, theta)).reshape(len(rows), -1)


def mrope_angles(positions: jax.Array, sections: Sequence[int], theta: float) -> jax.Array:
  """Angles of multimodal positions: contiguous sections of the frequencies rotate with time, row and column.

  Args:
    positions: int32[3, ..., T]; time, row and column.
    sections: number of frequencies per axis; they add up to H / 2.
    theta: base of the frequencies.

  Returns:
    float32[..., T, H / 2].
  """
  parts = np.split(frequencies(2 * sum(sections), theta), np.cumsum(sections)[:-1])
  places = positions.astype(jnp.float32)
  return jnp.concatenate([place[..., None] * part for place, part in zip(places, parts, strict=True)], axis=-1)


def rotation(angles: jax.Array | np.ndarray) -> tuple[jax.Array, jax.Array]:
  """(cos, sin) for `rotate`: float32[..., T, H / 2] -> two float32[..., T, 1, H / 2]; the same for every head."""
  return jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]


def rotate(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotates each pair of features by its angle: float[..., T, N, H] -> the same shape and dtype."""
  cos, sin = cos_sin
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
