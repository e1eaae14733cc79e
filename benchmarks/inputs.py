"""Images, tokens and noise of a size, the same arrays for every backend."""

import numpy as np

from benchmarks.sizes import Size, image_token

PATCH_PX, MERGE = 14, 2
LATENT_CHANNELS, DOWNSAMPLING = 16, 8


def words(size: Size, *shape: int, seed: int) -> np.ndarray:
  """int32 ids of words."""
  return np.random.default_rng(seed).integers(10, image_token(size) - 10, shape, np.int32)


def caption_prompt(size: Size) -> np.ndarray:
  """int32[P]: start, image slots, end, question."""
  slots = (size.caption_px // PATCH_PX // MERGE) ** 2
  start, end = image_token(size) - 3, image_token(size) - 2
  question = words(size, size.question_tokens - 2, seed=1)
  return np.concatenate([[start], np.full(slots, image_token(size)), [end], question]).astype(np.int32)


def generation_template(size: Size) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(before a caption, after it, a whole negative prompt), int32."""
  return words(size, 5, seed=2), words(size, 3, seed=3), words(size, 8, seed=4)


def images(size: Size, side: int, count: int, seed: int = 5) -> np.ndarray:
  """uint8[count, side, side, 3]."""
  return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def captions(size: Size) -> np.ndarray:
  """int32[prompts, rollouts, caption_tokens]."""
  return words(size, size.prompts, size.rollouts, size.caption_tokens, seed=6)


def advantages(size: Size) -> np.ndarray:
  """float32[prompts, rollouts], zero mean in a group."""
  values = np.random.default_rng(7).normal(size=(size.prompts, size.rollouts))
  return (values - values.mean(axis=1, keepdims=True)).astype(np.float32)


def noise(size: Size, side: int, *leading: int, seed: int = 8) -> np.ndarray:
  """float32[*leading, side / 8, side / 8, 16]: latents of images of `side` pixels."""
  shape = (*leading, side // DOWNSAMPLING, side // DOWNSAMPLING, LATENT_CHANNELS)
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


def context(size: Size, rows: int, width: int, seed: int = 9) -> np.ndarray:
  """float32[rows, context_tokens, width]: what a connector could give."""
  return np.random.default_rng(seed).standard_normal((rows, size.context_tokens, width), np.float32)


def pixels(size: Size, side: int, count: int) -> np.ndarray:
  """float32[count, side, side, 3] in [-1, 1]."""
  return images(size, side, count).astype(np.float32) / 127.5 - 1
