"""Weight tables for transformers' SiglipModel and its individual towers, to and from `models.siglip2`.

Source: transformers 5.23 modeling_siglip.py.
"""

from uae_jax.models.siglip2 import SigLIP2Config, SigLIP2TextConfig, SigLIP2VisionConfig
from uae_jax.weights.moves import Reshape
from uae_jax.weights.table import Row, linear, norm
from uae_jax.weights.vit import blocks, inside, multihead_attention, patch_embed

IGNORED = {r"\.position_ids$": "0, 1, 2, ...: stored by transformers before 4.31"}
# Ignored when one tower is read from a checkpoint of both.
IGNORED_BY_VISION = IGNORED | {r"^text_model\.|^logit_(scale|bias)$": "the text tower"}
IGNORED_BY_TEXT = IGNORED | {r"^vision_model\.|^logit_(scale|bias)$": "the image tower"}

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


def vision_table(config: SigLIP2VisionConfig) -> tuple[Row, ...]:
  """Rows for every parameter of `SigLIP2Vision(config)`."""
  return (
    *patch_embed("vision_model.embeddings.patch_embedding", config.patch, config.width, bias=True),
    Row("vision_model.embeddings.position_embedding.weight", "positions"),
    *blocks(config, "vision_model.encoder.layers.{layer}", BLOCK),
    *norm("vision_model.post_layernorm", "norm_out", bias=True),
    Row("vision_model.head.probe", "pool/probe", Reshape((1, 1, config.width), (config.width,))),
    *multihead_attention("vision_model.head.attention", "pool/attention"),
    *norm("vision_model.head.layernorm", "pool/norm", bias=True),
    *linear("vision_model.head.mlp.fc1", "pool/mlp/up"),
    *linear("vision_model.head.mlp.fc2", "pool/mlp/down"),
  )


def text_table(config: SigLIP2TextConfig) -> tuple[Row, ...]:
  """Rows for every parameter of `SigLIP2Text(config)`."""
  return (
    Row("text_model.embeddings.token_embedding.weight", "token_embedding"),
    Row("text_model.embeddings.position_embedding.weight", "positions"),
    *blocks(config, "text_model.encoder.layers.{layer}", BLOCK),
    *norm("text_model.final_layer_norm", "norm_out", bias=True),
    *linear("text_model.head", "projection"),
  )


def table(config: SigLIP2Config) -> tuple[Row, ...]:
  """Rows for every parameter of `SigLIP2(config)`: SiglipModel."""
  return (
    *inside("vision", vision_table(config.vision)),
    *inside("text", text_table(config.text)),
    Row("logit_scale", "logit_scale", Reshape((1,), ())),
    Row("logit_bias", "logit_bias", Reshape((1,), ())),
  )
