"""Weight tables for transformers' CLIPModel and its individual towers, to and from `models.clip`.

Source: transformers 5.23 modeling_clip.py.
"""

from uae_jax.models.clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from uae_jax.weights.table import Row, linear, norm
from uae_jax.weights.vit import blocks, inside, patch_embed

IGNORED = {r"\.position_ids$": "0, 1, 2, ...: stored by transformers before 4.31"}
# Ignored when one tower is read from a checkpoint of both.
IGNORED_BY_VISION = IGNORED | {r"^text_model\.|^text_projection\.|^logit_scale$": "the text tower"}
IGNORED_BY_TEXT = IGNORED | {r"^vision_model\.|^visual_projection\.|^logit_scale$": "the image tower"}

BLOCK = {
  "attention_norm": "layer_norm1",
  "query": "self_attn.q_proj",
  "key": "self_attn.k_proj",
  "value": "self_attn.v_proj",
  "out": "self_attn.out_proj",
  "mlp_norm": "layer_norm2",
  "up": "mlp.fc1",
  "down": "mlp.fc2",
}


def vision_table(config: CLIPVisionConfig) -> tuple[Row, ...]:
  """Rows for every parameter of `CLIPVision(config)`: CLIPVisionModelWithProjection."""
  return (
    *patch_embed("vision_model.embeddings.patch_embedding", config.patch, config.width, bias=False),
    Row("vision_model.embeddings.class_embedding", "class_token"),
    Row("vision_model.embeddings.position_embedding.weight", "positions"),
    # Spelled this way in transformers.
    *norm("vision_model.pre_layrnorm", "norm_in", bias=True),
    *blocks(config, "vision_model.encoder.layers.{layer}", BLOCK),
    *norm("vision_model.post_layernorm", "norm_out", bias=True),
    *linear("visual_projection", "projection", bias=False),
  )


def text_table(config: CLIPTextConfig) -> tuple[Row, ...]:
  """Rows for every parameter of `CLIPText(config)`: CLIPTextModelWithProjection, as in the text towers of SD3."""
  return (
    Row("text_model.embeddings.token_embedding.weight", "token_embedding"),
    Row("text_model.embeddings.position_embedding.weight", "positions"),
    *blocks(config, "text_model.encoder.layers.{layer}", BLOCK),
    *norm("text_model.final_layer_norm", "norm_out", bias=True),
    *linear("text_projection", "projection", bias=False),
  )


def table(config: CLIPConfig) -> tuple[Row, ...]:
  """Rows for every parameter of `CLIP(config)`: CLIPModel."""
  return (
    *inside("vision", vision_table(config.vision)),
    *inside("text", text_table(config.text)),
    Row("logit_scale", "logit_scale"),
  )
