"""Weight table for transformers' DINOv3ViTModel, to and from `models.dinov3`.

Source: transformers 5.23 modeling_dinov3_vit.py, and the published files.
"""

from collections.abc import Iterable

from uae_jax.models.dinov3 import DINOv3Config
from uae_jax.weights.moves import Reshape
from uae_jax.weights.table import Row, norm
from uae_jax.weights.vit import blocks, patch_embed

IGNORED: dict[str, str] = {}

BLOCK = {
  "attention_norm": "norm1",
  "query": "attention.q_proj",
  "key": "attention.k_proj",
  "value": "attention.v_proj",
  "out": "attention.o_proj",
  "attention_scale": "layer_scale1.lambda1",
  "mlp_norm": "norm2",
  "gate": "mlp.gate_proj",
  "up": "mlp.up_proj",
  "down": "mlp.down_proj",
  "mlp_scale": "layer_scale2.lambda1",
}


def is_v5(names: Iterable[str]) -> bool:
  """Whether tensors have the in-memory names of transformers 5."""
  return any(name.startswith("model.layer.") for name in names)


def table(config: DINOv3Config, *, v5: bool = False) -> tuple[Row, ...]:
  """Rows for every parameter of `DINOv3(config)`, with file names or the in-memory names of transformers 5 (`v5`)."""
  width, registers = config.width, (config.num_registers, config.width)
  return (
    *patch_embed("embeddings.patch_embeddings", config.patch, width, bias=True),
    Row("embeddings.cls_token", "class_token", Reshape((1, 1, width), (width,))),
    Row("embeddings.mask_token", "mask_token", Reshape((1, 1, width), (width,))),
    Row("embeddings.register_tokens", "registers", Reshape((1, *registers), registers)),
    *blocks(config, ("model." if v5 else "") + "layer.{layer}", BLOCK),
    *norm("norm", "norm_out", bias=True),
  )
