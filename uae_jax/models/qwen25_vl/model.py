"""The complete Qwen2.5-VL. Source: transformers 5.23 modeling_qwen2_5_vl.py, Qwen2_5_VLForConditionalGeneration."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from uae_jax.models.language import LanguageConfig, LanguageModel
from uae_jax.models.language_captioner import LanguageCaptioner, LanguageCaptionerConfig
from uae_jax.models.positions import mrope_positions
from uae_jax.models.prompts import Prompts, Questions, fill_image
from uae_jax.models.qwen25_vl.vision import VisionConfig, VisionTower, normalize, patchify


@dataclasses.dataclass(frozen=True)
class Qwen25VLConfig(LanguageCaptionerConfig):
  """Architecture of the vision tower and the language model."""

  vision: VisionConfig

  def __post_init__(self):
    super().__post_init__()
    if self.vision.out_width != self.language.width:
      raise ValueError(f"vision.out_width {self.vision.out_width} is not language.width {self.language.width}")

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
    """Reads a `config.json` as written by transformers 4.50 (flat) or 5 (nested)."""
    return cls(
      vision=VisionConfig.from_huggingface(config["vision_config"]),
      language=LanguageConfig.from_huggingface(config),
      image_token_id=config["image_token_id"],
    )

  @property
  def patch_size(self) -> int:
    return self.vision.patch_size

  def build(self, rngs: nnx.Rngs) -> "Qwen25VL":
    """The module of these sizes, with random weights."""
    return Qwen25VL(self, rngs=rngs)


def inputs_spec(
  config: Qwen25VLConfig, batch: int, tokens: int, grid: tuple[int, int], dtype=jnp.float32
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of the array inputs of `Qwen25VL.embed_prompt`, by name; `grid` is (rows, columns) of patches."""
  return {
    "tokens": jax.ShapeDtypeStruct((batch, tokens), jnp.int32),
    "patches": jax.ShapeDtypeStruct((batch, grid[0] * grid[1], config.vision.patch_values), dtype),
  }


class Qwen25VL(LanguageCaptioner):
  """Vision tower and language model as one `models.captioner.Captioner`."""

  config: Qwen25VLConfig

  def __init__(self, config: Qwen25VLConfig, *, rngs: nnx.Rngs):
    self.vision = VisionTower(config.vision, rngs=rngs)
    self.language = LanguageModel(config.language, rngs=rngs)
    self.config = config

  def embed_prompt(self, tokens: jax.Array, patches: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Token embeddings with the image tokens filled in; one image per row.

    Args:
      tokens: int32[B, T] with `image_token_id` grid[0] * grid[1] / spatial_merge ** 2 times per row.
      patches: float[B, patches, patch_values] of `vision.patchify`.
      grid: static (rows, columns) of patches.

    Returns:
      float[B, T, D] in the dtype of the embedding table.
    """
    embeddings = self.language.embed(tokens)
    image = self.vision(patches.astype(embeddings.dtype), grid)
    return fill_image(embeddings, tokens == self.config.image_token_id, image)

  def prompt(
    self, prompts: Prompts, images: jax.Array, questions: Questions | None = None
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Embeds the image and the question of every row.

    Args:
      prompts: the templates; the image in them takes the grid of `images`.
      images: uint8[B, h, w, 3]; sides are multiples of patch_size * spatial_merge.
      questions: a prompt per row; by default all rows have `prompts.caption`.

    Returns:
      (embeddings float[B, P, D], positions int32[3, B, P], mask bool[B, P]).
    """
    vision = self.config.vision
    batch, height, width, _ = images.shape
    grid = (height // vision.patch_size, width // vision.patch_size)
    cells = (grid[0] // vision.spatial_merge, grid[1] // vision.spatial_merge)
    prompts = prompts.for_image(cells, self.config.image_token_id)
    patches = patchify(normalize(images, vision), vision)
    if questions is not None:
      tokens, mask = questions.tokens, questions.mask
      positions = mrope_positions(tokens, mask, self.config.image_token_id, grid_merged=prompts.image_grid)
      return self.embed_prompt(tokens, patches, grid), jnp.asarray(positions), mask
    tokens = jnp.broadcast_to(jnp.asarray(prompts.caption), (batch, len(prompts.caption)))
    mask = jnp.ones(tokens.shape, bool)
    embeddings = self.embed_prompt(tokens, patches, grid)
    # All rows share one template, so the positions are constants of the program.
    row = mrope_positions(prompts.caption[None], mask[:1], self.config.image_token_id, grid_merged=prompts.image_grid)
    return embeddings, jnp.broadcast_to(jnp.asarray(row), (3, *tokens.shape)), mask
