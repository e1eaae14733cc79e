"""DINOv2: a self-supervised vision transformer, with or without register tokens.

Source: Oquab et al. 2023 (arXiv 2304.07193), Darcet et al. 2023 (arXiv 2309.16588); transformers 5.23
modeling_dinov2.py and modeling_dinov2_with_registers.py. Letters: see layers/__init__.py.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from uae_jax.layers.buffer import Buffer
from uae_jax.layers.lora import Linear
from uae_jax.layers.norms import LayerNorm
from uae_jax.layers.resize import resize
from uae_jax.models.vit import Encoder, ViTConfig, patches, prepend
from uae_jax.sharding import constrain, gather


@dataclasses.dataclass(frozen=True, kw_only=True)
class DINOv2Config(ViTConfig):
  """Architecture of a DINOv2 model.

  Attributes:
    image_px: side, in pixels, of the square image that the stored position table is for.
    patch: side of a patch, in pixels.
    num_registers: number of register tokens; models that have them resize the position table with antialiasing.
  """

  image_px: int
  patch: int
  num_registers: int = 0
  norm_eps: float = 1e-6
  layer_scale: float | None = 1.0

  @property
  def grid(self) -> int:
    """Side of the stored position table, in patches."""
    return self.image_px // self.patch

  @classmethod
  def dinov2_large(cls) -> "DINOv2Config":
    """Source: facebook/dinov2-large, config.json."""
    return cls(image_px=518, patch=14, width=1024, depth=24, num_heads=16, mlp_width=4096)

  @classmethod
  def dinov2_large_registers(cls) -> "DINOv2Config":
    """Source: facebook/dinov2-with-registers-large, config.json."""
    return dataclasses.replace(cls.dinov2_large(), num_registers=4)

  @classmethod
  def from_huggingface(cls, config: Mapping[str, Any]) -> "DINOv2Config":
    """Reads the `config.json` of a transformers Dinov2Model or Dinov2WithRegistersModel.

    Raises:
      ValueError: the file describes an unsupported architecture.
    """
    if config.get("use_swiglu_ffn"):
      raise ValueError("use_swiglu_ffn (DINOv2-giant) is not supported")
    has_registers = config.get("model_type") == "dinov2_with_registers"
    width = config.get("hidden_size", 768)
    bias = config.get("qkv_bias", True)
    return cls(
      image_px=config.get("image_size", 224),
      patch=config.get("patch_size", 16 if has_registers else 14),
      num_registers=config.get("num_register_tokens", 4) if has_registers else 0,
      width=width,
      depth=config.get("num_hidden_layers", 12),
      num_heads=config.get("num_attention_heads", 12),
      mlp_width=int(width * config.get("mlp_ratio", 4)),
      activation=config.get("hidden_act", "gelu"),
      norm_eps=config.get("layer_norm_eps", 1e-6),
      layer_scale=config.get("layerscale_value", 1.0),
      query_bias=bias,
      key_bias=bias,
      value_bias=bias,
    )


class DINOv2(nnx.Module):
  """A DINOv2 model; its output is the class token."""

  def __init__(self, config: DINOv2Config, *, rngs: nnx.Rngs):
    width = config.width
    normal = nnx.initializers.normal(0.02)
    self.patch_embed = Linear(config.patch**2 * 3, width, axes=("patch", "embed"), rngs=rngs)
    self.class_token = nnx.Param(normal(rngs.params(), (width,)), out_sharding=("embed",))
    # Replaces masked patches in pretraining; stored so that an export has every tensor of the original.
    self.mask_token = Buffer(jnp.zeros((width,), jnp.float32), out_sharding=("embed",))
    if config.num_registers:
      registers = normal(rngs.params(), (config.num_registers, width))
      self.registers = nnx.Param(registers, out_sharding=(None, "embed"))
    positions = normal(rngs.params(), (config.grid**2 + 1, width))
    self.positions = nnx.Param(positions, out_sharding=(None, "embed"))
    self.encoder = Encoder(config, rngs=rngs)
    self.norm_out = LayerNorm(width, eps=config.norm_eps)
    self.config = config

  def __call__(self, pixels: jax.Array) -> jax.Array:
    """The class token after the final norm. Computes in the dtype of `pixels`.

    Args:
      pixels: float[B, H, W, 3], normalized with ImageNet's mean and standard deviation; H and W at least one patch.

    Returns:
      float[B, D].
    """
    return self.norm_out(self._states(pixels)[:, 0])

  def patch_states(self, pixels: jax.Array) -> jax.Array:
    """States of the patches in raster order after the final norm: float[B, patches, D]; `pixels` as for a call."""
    return self.norm_out(self._states(pixels)[:, 1 + self.config.num_registers :])

  def _states(self, pixels: jax.Array) -> jax.Array:
    """States of class token, registers and patches before the final norm."""
    config = self.config
    x = prepend(gather(self.class_token[...], "embed"), self.patch_embed(patches(pixels, config.patch)))
    x = x + self.position_table(pixels.shape[1] // config.patch, pixels.shape[2] // config.patch).astype(x.dtype)
    if config.num_registers:
      # Registers have no position embedding, so they are inserted after the table is added.
      x = jnp.concatenate([x[:, :1], prepend(gather(self.registers[...], None, "embed"), x[:, 1:])], axis=1)
    return self.encoder(constrain(x, "batch", "act_tokens", "act_embed"))

  def position_table(self, height: int, width: int) -> jax.Array:
    """The position table resized to a grid of height x width patches: float32[1 + height * width, D]."""
    positions = gather(self.positions[...], None, "embed").astype(jnp.float32)
    grid = self.config.grid
    table = positions[1:].reshape(1, grid, grid, -1)
    table = resize(table, height, width, antialias=self.config.num_registers > 0)
    return jnp.concatenate([positions[:1], table.reshape(height * width, -1)])
