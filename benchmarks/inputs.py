"""Images, tokens and noise for a size; the arrays are the same for every backend."""

import numpy as np

from benchmarks.sizes import Size, image_token

PATCH_PX, MERGE = 14, 2
LATENT_CHANNELS, DOWNSAMPLING = 16, 8
EMBEDDER_PX = 224  # side of the inputs of the embedders at full size


def words(size: Size, *shape: int, seed: int) -> np.ndarray:
  """Random word ids, int32."""
  return np.random.default_rng(seed).integers(10, image_token(size) - 10, shape, np.int32)


def caption_prompt(size: Size) -> np.ndarray:
  """int32[P]: start token, image tokens, end token, question."""
  slots = (size.caption_px // PATCH_PX // MERGE) ** 2
  start, end = image_token(size) - 3, image_token(size) - 2
  question = words(size, size.question_tokens - 2, seed=1)
  return np.concatenate([[start], np.full(slots, image_token(size)), [end], question]).astype(np.int32)


def generation_template(size: Size) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(tokens before a caption, tokens after it, complete negative prompt), all int32."""
  return words(size, 5, seed=2), words(size, 3, seed=3), words(size, 8, seed=4)


def images(size: Size, side: int, count: int, seed: int = 5) -> np.ndarray:
  """Random images, uint8[count, side, side, 3]."""
  return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def captions(size: Size) -> np.ndarray:
  """Random captions, int32[prompts, rollouts, caption_tokens]."""
  return words(size, size.prompts, size.rollouts, size.caption_tokens, seed=6)


def advantages(size: Size) -> np.ndarray:
  """Random advantages, float32[prompts, rollouts], with zero mean in each group."""
  values = np.random.default_rng(7).normal(size=(size.prompts, size.rollouts))
  return (values - values.mean(axis=1, keepdims=True)).astype(np.float32)


def noise(size: Size, side: int, *leading: int, seed: int = 8) -> np.ndarray:
  """Latent noise for images of `side` pixels, float32[*leading, side / 8, side / 8, 16]."""
  shape = (*leading, side // DOWNSAMPLING, side // DOWNSAMPLING, LATENT_CHANNELS)
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


def context(size: Size, rows: int, width: int, seed: int = 9) -> np.ndarray:
  """Random decoder context in place of a connector's output, float32[rows, context_tokens, width]."""
  return np.random.default_rng(seed).standard_normal((rows, size.context_tokens, width), np.float32)


def pixels(size: Size, side: int, count: int) -> np.ndarray:
  """Random images in [-1, 1], float32[count, side, side, 3]."""
  return images(size, side, count).astype(np.float32) / 127.5 - 1
