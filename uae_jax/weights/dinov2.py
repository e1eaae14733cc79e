"""Weight table for transformers' Dinov2Model and Dinov2WithRegistersModel, to and from `models.dinov2`.

Source: transformers 5.23 modeling_dinov2.py, modeling_dinov2_with_registers.py, and the published files.
"""

from collections.abc import Iterable

from uae_jax.models.dinov2 import DINOv2Config
from uae_jax.weights.moves import Reshape
from uae_jax.weights.table import Row, norm
from uae_jax.weights.vit import blocks, patch_embed

IGNORED: dict[str, str] = {}

BLOCK = {
  "attention_norm": "norm1",
  "query": "attention.attention.query",
  "key": "attention.attention.key",
  "value": "attention.attention.value",
  "out": "attention.output.dense",
  "attention_scale": "layer_scale1.lambda1",
  "mlp_norm": "norm2",
  "up": "mlp.fc1",
  "down": "mlp.fc2",
  "mlp_scale": "layer_scale2.lambda1",
}
# Names in memory of transformers 5, which still writes files with the names above.
BLOCK_V5 = BLOCK | {
  "query": "attention.q_proj",
  "key": "attention.k_proj",
  "value": "attention.v_proj",
  "out": "attention.o_proj",
}


def is_v5(names: Iterable[str]) -> bool:
  """Whether tensors have the in-memory names of transformers 5."""
  return any(name.endswith("attention.q_proj.weight") for name in names)


def table(config: DINOv2Config, *, v5: bool = False) -> tuple[Row, ...]:
  """Rows for every parameter of `DINOv2(config)`, with file names or the in-memory names of transformers 5 (`v5`)."""
  width, num_positions = config.width, config.grid**2 + 1
  rows = [
    *patch_embed("embeddings.patch_embeddings.projection", config.patch, width, bias=True),
    Row("embeddings.cls_token", "class_token", Reshape((1, 1, width), (width,))),
    Row("embeddings.mask_token", "mask_token", Reshape((1, width), (width,))),
    Row("embeddings.position_embeddings", "positions", Reshape((1, num_positions, width), (num_positions, width))),
    *blocks(config, "encoder.layer.{layer}", BLOCK_V5 if v5 else BLOCK),
    *norm("layernorm", "norm_out", bias=True),
  ]
  if config.num_registers:
    shape = (config.num_registers, width)
    rows.append(Row("embeddings.register_tokens", "registers", Reshape((1, *shape), shape)))
  return tuple(rows)
