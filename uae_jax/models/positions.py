"""Multimodal rotary positions (M-RoPE): every token has a time, a row and a column.

Source: transformers 4.50 modeling_qwen2_5_vl.py, get_rope_index. A text token has three equal coordinates, which
increase by one per token; the cells of an h x w image that starts at s are at (s, s + row, s + column), and the text
after it continues at s + max(h, w). Padding has position 1, as in the training of the official weights.
"""

from typing import overload

import jax
import jax.numpy as jnp
import numpy as np

PADDING_POSITION = 1


def mrope_positions(tokens, mask, image_token_id: int, grid_merged: tuple) -> np.ndarray | jax.Array:
  """Positions of prompts with any number of images per row, all of one size, and text before, between and after them.

  Args:
    tokens: int[B, T]; each image is h * w consecutive `image_token_id`.
    mask: bool[B, T]; False at padding, which may be anywhere.
    image_token_id: id of the placeholder of an image token.
    grid_merged: (h, w) in cells: two ints, or two int[B] if image sizes differ between rows.

  Returns:
    int32[3, B, T]; NumPy if tokens and mask are NumPy, so it can be a constant of a program, else JAX.

  Raises:
    ValueError: a row has a fractional number of images; checked for NumPy inputs only.
  """
  on_host = isinstance(tokens, np.ndarray) and isinstance(mask, np.ndarray)
  xp = np if on_host else jnp
  mask = mask.astype(bool)
  height, width = (xp.asarray(side, dtype=np.int32).reshape(-1, 1) for side in grid_merged)
  is_image = (tokens == image_token_id) & mask
  if on_host and np.any(is_image.sum(axis=1, keepdims=True) % (height * width)):
    raise ValueError(f"the image tokens of a row are not a multiple of the {grid_merged} cells of an image")

  def before(flags):
    return xp.cumsum(flags, axis=1) - flags

  image, cell = xp.divmod(before(is_image), height * width)
  start = before(mask & ~is_image) + image * xp.maximum(height, width)
  cell = xp.where(is_image, cell, 0)
  positions = xp.stack([start, start + cell // width, start + cell % width])
  return xp.where(mask, positions, PADDING_POSITION).astype(np.int32)


@overload
def text_positions(mask: np.ndarray) -> np.ndarray: ...
@overload
def text_positions(mask: jax.Array) -> jax.Array: ...
def text_positions(mask):
  """Positions int32[3, B, T] of rows without images, of mask bool[B, T], False at padding; NumPy or JAX as the mask."""
  xp = np if isinstance(mask, np.ndarray) else jnp
  counted = xp.where(mask, xp.cumsum(mask, axis=1) - 1, PADDING_POSITION).astype(np.int32)
  return xp.broadcast_to(counted, (3, *counted.shape))


@overload
def next_position(positions: np.ndarray, mask: np.ndarray) -> np.ndarray: ...
@overload
def next_position(positions: jax.Array, mask: jax.Array) -> jax.Array: ...
def next_position(positions, mask):
  """The position int32[B] where generation continues: one after the largest, which is not the row's length."""
  xp = np if isinstance(positions, np.ndarray) and isinstance(mask, np.ndarray) else jnp
  return xp.max(xp.where(mask, positions, -1), axis=(0, 2)) + 1
