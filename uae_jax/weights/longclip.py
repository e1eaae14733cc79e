"""Weight tables for Long-CLIP checkpoints, in the layout of OpenAI's CLIP, to and from `models.clip`.

Projections are stored as [in, out], like our kernels. Source: Long-CLIP, model/model_longclip.py.
"""

from collections.abc import Mapping
import math

import numpy as np

from uae_jax.models.clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from uae_jax.weights.table import Row, norm
from uae_jax.weights.vit import blocks, inside, patch_embed

IGNORED: dict[str, str] = {}
# Ignored when the image tower is read from a checkpoint of both.
IGNORED_BY_VISION = {r"^(?!visual\.)": "the text tower"}
# Ignored when the text tower is read.
IGNORED_BY_TEXT = {r"^visual\.|^logit_scale$": "the image tower"}

BLOCK = {
  "attention_norm": "ln_1",
  "attention": "attn",
  "mlp_norm": "ln_2",
  "up": "mlp.c_fc",
  "down": "mlp.c_proj",
}
HEAD_WIDTH = 64
KEPT_POSITIONS = 20


def config_of(tensors: Mapping[str, np.ndarray]) -> CLIPConfig:
  """Derives the architecture from tensor shapes, because the file has no config.

  Raises:
    ValueError: the tensors are not in the layout of OpenAI's CLIP with two position tables.
  """
  needed = ("visual.conv1.weight", "visual.positional_embedding", "positional_embedding_res", "text_projection")
  missing = [name for name in needed if name not in tensors]
  if missing:
    raise ValueError(f"no {', '.join(missing)}")
  width, _, patch, _ = tensors["visual.conv1.weight"].shape
  grid = math.isqrt(tensors["visual.positional_embedding"].shape[0] - 1)
  text_width, projection_width = tensors["text_projection"].shape
  vision = CLIPVisionConfig(
    image_px=patch * grid,
    patch=patch,
    projection_width=projection_width,
    width=width,
    depth=depth(tensors, "visual.transformer."),
    num_heads=width // HEAD_WIDTH,
    mlp_width=4 * width,
    activation="quick_gelu",
  )
  text = CLIPTextConfig(
    vocab_size=tensors["token_embedding.weight"].shape[0],
    max_tokens=tensors["positional_embedding_res"].shape[0],
    projection_width=projection_width,
    position_split=KEPT_POSITIONS,
    width=text_width,
    depth=depth(tensors, "transformer."),
    num_heads=text_width // HEAD_WIDTH,
    mlp_width=4 * text_width,
    activation="quick_gelu",
  )
  return CLIPConfig(vision, text)


def depth(tensors: Mapping[str, np.ndarray], prefix: str) -> int:
  """Number of layers of the tower whose tensors start with `prefix`."""
  return sum(name.startswith(prefix) and name.endswith(".ln_1.weight") for name in tensors)


def vision_table(config: CLIPVisionConfig) -> tuple[Row, ...]:
  """Rows for every parameter of `CLIPVision(config)`."""
  return (
    *patch_embed("visual.conv1", config.patch, config.width, bias=False),
    Row("visual.class_embedding", "class_token"),
    Row("visual.positional_embedding", "positions"),
    *norm("visual.ln_pre", "norm_in", bias=True),
    *blocks(config, "visual.transformer.resblocks.{layer}", BLOCK),
    *norm("visual.ln_post", "norm_out", bias=True),
    Row("visual.proj", "projection/kernel"),
  )


def text_table(config: CLIPTextConfig) -> tuple[Row, ...]:
  """Rows for every parameter of `CLIPText(config)`."""
  return (
    Row("token_embedding.weight", "token_embedding"),
    Row("positional_embedding", "positions"),
    Row("positional_embedding_res", "late_positions"),
    *blocks(config, "transformer.resblocks.{layer}", BLOCK),
    *norm("ln_final", "norm_out", bias=True),
    Row("text_projection", "projection/kernel"),
  )


def table(config: CLIPConfig) -> tuple[Row, ...]:
  """Rows for every parameter of `CLIP(config)`."""
  return (
    *inside("vision", vision_table(config.vision)),
    *inside("text", text_table(config.text)),
    Row("logit_scale", "logit_scale"),
  )
