"""Qwen2.5-VL as a whole. Source: transformers 5.23 modeling_qwen2_5_vl.py, Qwen2_5_VLForConditionalGeneration."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from uae_jax.models.qwen25_vl.language import LanguageConfig, LanguageModel
from uae_jax.models.qwen25_vl.vision import VisionConfig, VisionTower


@dataclasses.dataclass(frozen=True)
class Qwen25VLConfig:
  """Vision tower and language model.

  Attributes:
    vision: the tower.
    language: the language model.
    image_token_id: the token whose embedding an image token replaces.
  """

  vision: VisionConfig
  language: LanguageConfig
  image_token_id: int

  def __post_init__(self):
    if self.vision.out_width != self.language.width:
      raise ValueError(f"vision.out_width {self.vision.out_width} is not language.width {self.language.width}")
    if not 0 <= self.image_token_id < self.language.vocab_size:
      raise ValueError(f"image_token_id {self.image_token_id} is not in a vocabulary of {self.language.vocab_size}")

  @classmethod
  def qwen25_vl_3b(cls) -> "Qwen25VLConfig":
    """Source: config.json of Qwen/Qwen2.5-VL-3B-Instruct."""
    return cls(VisionConfig.qwen25_vl(out_width=2048), LanguageConfig.qwen25_3b(), image_token_id=151655)

  @classmethod
  def qwen25_vl_7b(cls) -> "Qwen25VLConfig":
    """Source: config.json of Qwen/Qwen2.5-VL-7B-Instruct."""
    return cls(VisionConfig.qwen25_vl(out_width=3584), LanguageConfig.qwen25_7b(), image_token_id=151655)

  @classmethod
  def from_huggingface(cls, config: Mapping[str, Any]) -> "Qwen25VLConfig":
    """From a `config.json`, as transformers 4.50 (flat) or 5 (nested) writes it."""
    return cls(
      vision=VisionConfig.from_huggingface(config["vision_config"]),
      language=LanguageConfig.from_huggingface(config),
      image_token_id=config["image_token_id"],
    )


def inputs_spec(
  config: Qwen25VLConfig, batch: int, tokens: int, grid: tuple[int, int], dtype=jnp.float32
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of the arrays `Qwen25VL.embed_prompt` takes, by name; grid in patches."""
  return {
    "tokens": jax.ShapeDtypeStruct((batch, tokens), jnp.int32),
    "patches": jax.ShapeDtypeStruct((batch, grid[0] * grid[1], config.vision.patch_values), dtype),
  }


class Qwen25VL(nnx.Module):
  """The two nets; `language` is called directly on what `embed_prompt` gives."""

  def __init__(self, config: Qwen25VLConfig, *, rngs: nnx.Rngs):
    self.vision = VisionTower(config.vision, rngs=rngs)
    self.language = LanguageModel(config.language, rngs=rngs)
    self.config = config

  def embed_prompt(self, tokens: jax.Array, patches: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Token embeddings with the image filled in; one image a row.

    Args:
      tokens: int32[B, T] with grid[0] * grid[1] / spatial_merge ** 2 times `image_token_id` in each row.
      patches: float[B, patches, patch_values] of `vision.patchify`.
      grid: static (rows, columns) of patches.

    Returns:
      float[B, T, D] in the dtype of the embedding table.
    """
    embeddings = self.language.embed(tokens)
    image = self.vision(patches.astype(embeddings.dtype), grid)
    is_image = jnp.asarray(tokens == self.config.image_token_id)
    place = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, image.shape[1] - 1)
    filled = jnp.take_along_axis(image, place[..., None], axis=1)
    return jnp.where(is_image[..., None], filled, embeddings)
