"""Weight tables for open_clip's ViT-H-14, in the layout of OpenAI's CLIP, to and from `models.clip`.

Unlike Long-CLIP, it has one table of text positions, and exact GELU. Source: open_clip, model_configs/ViT-H-14.json.
"""

from collections.abc import Mapping
import math

import numpy as np

from uae_jax.models.clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from uae_jax.weights import longclip
from uae_jax.weights.table import Row
from uae_jax.weights.vit import inside

# Of both towers of ViT-H-14; the number of heads cannot be seen in the tensors.
NUM_HEADS = 16


def config_of(tensors: Mapping[str, np.ndarray]) -> CLIPConfig:
  """Derives the architecture from tensor shapes, because the file has no config.

  Raises:
    ValueError: the tensors are not in the layout of OpenAI's CLIP with one position table.
  """
  needed = ("visual.conv1.weight", "visual.positional_embedding", "positional_embedding", "text_projection")
  if missing := [name for name in needed if name not in tensors]:
    raise ValueError(f"no {', '.join(missing)}")
  if "positional_embedding_res" in tensors:
    raise ValueError("positional_embedding_res is in it: a Long-CLIP checkpoint")
  width, _, patch, _ = tensors["visual.conv1.weight"].shape
  text_width, projection_width = tensors["text_projection"].shape
  if width % NUM_HEADS or text_width % NUM_HEADS:
    raise ValueError(f"widths of {width} and {text_width}, expected multiples of the {NUM_HEADS} heads of ViT-H-14")
  vision = CLIPVisionConfig(
    image_px=patch * math.isqrt(tensors["visual.positional_embedding"].shape[0] - 1),
    patch=patch,
    projection_width=projection_width,
    width=width,
    depth=longclip.depth(tensors, "visual.transformer."),
    num_heads=NUM_HEADS,
    mlp_width=4 * width,
    activation="gelu",
  )
  text = CLIPTextConfig(
    vocab_size=tensors["token_embedding.weight"].shape[0],
    max_tokens=tensors["positional_embedding"].shape[0],
    projection_width=projection_width,
    width=text_width,
    depth=longclip.depth(tensors, "transformer."),
    num_heads=NUM_HEADS,
    mlp_width=4 * text_width,
    activation="gelu",
  )
  return CLIPConfig(vision, text)


def text_table(config: CLIPTextConfig) -> tuple[Row, ...]:
  """Rows for every parameter of `CLIPText(config)`."""
  return tuple(row for row in longclip.text_table(config) if row.ours != "late_positions")


def table(config: CLIPConfig) -> tuple[Row, ...]:
  """Rows for every parameter of `CLIP(config)`."""
  return (
    *inside("vision", longclip.vision_table(config.vision)),
    *inside("text", text_table(config.text)),
    Row("logit_scale", "logit_scale"),
  )
