"""The sizes of the tower through which Janus reads images, and the MLP that takes its states to the language model.

Source: transformers 5.23 modeling_janus.py, JanusVisionModel and JanusVisionAlignerMLP.
"""

from collections.abc import Mapping
from typing import Any

from flax import nnx
import jax

from uae_jax.layers.lora import Linear
from uae_jax.models.vit import ACTIVATIONS, PatchTowerConfig


def siglip_large() -> PatchTowerConfig:
  """Of Janus-Pro-1B and 7B. Source: deepseek-community/Janus-Pro-1B, config.json, vision_config."""
  return PatchTowerConfig(image_px=384, patch=16, width=1024, depth=24, num_heads=16, mlp_width=4096)


def tower_from_huggingface(config: Mapping[str, Any]) -> PatchTowerConfig:
  """Reads the `vision_config` of a transformers JanusConfig; absent fields get the defaults of transformers.

  Raises:
    ValueError: it describes an unsupported architecture.
  """
  if config.get("use_qk_norm"):
    raise ValueError("vision_config.use_qk_norm is true: norms of queries and keys are not supported")
  image_px, patch = config.get("image_size", 384), config.get("patch_size", 16)
  if not isinstance(image_px, int) or not isinstance(patch, int):
    raise ValueError(f"vision_config has image_size {image_px} and patch_size {patch}; expected squares")
  tokens = config.get("num_image_tokens", 576)
  if tokens != (image_px // patch) ** 2:
    raise ValueError(f"vision_config.num_image_tokens is {tokens}, images have {(image_px // patch) ** 2} patches")
  width, bias = config.get("hidden_size", 1024), config.get("attention_bias", True)
  return PatchTowerConfig(
    image_px=image_px,
    patch=patch,
    width=width,
    depth=config.get("num_hidden_layers", 24),
    num_heads=config.get("num_attention_heads", 16),
    mlp_width=int(width * config.get("mlp_ratio", 4.0)),
    activation=config.get("hidden_act", "gelu"),
    norm_eps=config.get("layer_norm_eps", 1e-6),
    query_bias=bias,
    key_bias=bias,
    value_bias=bias,
  )


class Aligner(nnx.Module):
  """Linear layers with an activation between them: float[..., in_width] -> float[..., width]."""

  def __init__(self, in_width: int, width: int, depth: int, activation: str, *, rngs: nnx.Rngs):
    for i in range(depth):
      layer = Linear(width if i else in_width, width, axes=("mlp" if i else None, "embed"), rngs=rngs)
      setattr(self, f"layer{i}", layer)
    self.depth, self.activation = depth, activation

  def __call__(self, x: jax.Array) -> jax.Array:
    for i in range(self.depth):
      x = getattr(self, f"layer{i}")(ACTIVATIONS[self.activation](x) if i else x)
    return x
