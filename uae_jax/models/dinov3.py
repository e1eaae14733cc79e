"""DINOv3: a self-supervised vision transformer with rotary position embeddings and register tokens.

Source: Siméoni et al. 2025 (arXiv 2508.10104), transformers 5.23 modeling_dinov3_vit.py. Letters: layers/__init__.py.
"""

from collections.abc import Mapping
import dataclasses
import functools
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from uae_jax.layers.buffer import Buffer
from uae_jax.layers.lora import Linear
from uae_jax.layers.norms import LayerNorm
from uae_jax.models.vit import Encoder, ViTConfig, patches, prepend
from uae_jax.sharding import constrain, gather


@dataclasses.dataclass(frozen=True, kw_only=True)
class DINOv3Config(ViTConfig):
  """Architecture of a DINOv3 model.

  Attributes:
    patch: side of a patch, in pixels.
    num_registers: number of register tokens after the class token.
    rope_theta: base of the rotary frequencies, about the ratio of the longest to the shortest wavelength.
  """

  patch: int
  num_registers: int
  rope_theta: float = 100.0
  key_bias: bool = False
  layer_scale: float | None = 1.0

  def __post_init__(self):
    super().__post_init__()
    if self.head_width % 4:
      raise ValueError(f"head width {self.head_width} (width / num_heads) must be a multiple of 4 for the rotation")

  @classmethod
  def dinov3_vitl16(cls) -> "DINOv3Config":
    """Source: facebook/dinov3-vitl16-pretrain-lvd1689m, config.json."""
    return cls(patch=16, num_registers=4, width=1024, depth=24, num_heads=16, mlp_width=4096)

  @classmethod
  def from_huggingface(cls, config: Mapping[str, Any]) -> "DINOv3Config":
    """Reads the `config.json` of a transformers DINOv3ViTModel; absent fields get the defaults of transformers."""
    return cls(
      patch=config.get("patch_size", 16),
      num_registers=config.get("num_register_tokens", 0),
      rope_theta=config.get("rope_theta", 100.0),
      width=config.get("hidden_size", 384),
      depth=config.get("num_hidden_layers", 12),
      num_heads=config.get("num_attention_heads", 6),
      mlp_width=config.get("intermediate_size", 1536),
      activation=config.get("hidden_act", "gelu"),
      norm_eps=config.get("layer_norm_eps", 1e-5),
      layer_scale=config.get("layerscale_value", 1.0),
      query_bias=config.get("query_bias", True),
      key_bias=config.get("key_bias", False),
      value_bias=config.get("value_bias", True),
      out_bias=config.get("proj_bias", True),
      mlp_bias=config.get("mlp_bias", True),
      gated_mlp=config.get("use_gated_mlp", False),
    )


def rope_angles(config: DINOv3Config, height: int, width: int) -> np.ndarray:
  """Rotary angles float32[height * width, H / 2]: for each patch those of its row, then those of its column.

  The position of a patch is its center, in coordinates that span -1 to 1 on both axes for any image size.
  """
  rows, columns = ((2 * (np.arange(size) + 0.5) / size - 1).astype(np.float32) for size in (height, width))
  quarter = config.head_width // 4
  frequencies = (2 * math.pi * config.rope_theta ** (-np.arange(quarter) / quarter)).astype(np.float32)
  shape = (height, width, quarter)
  row_angles = np.broadcast_to(rows[:, None, None] * frequencies, shape)
  column_angles = np.broadcast_to(columns[None, :, None] * frequencies, shape)
  return np.concatenate([row_angles, column_angles], axis=-1).reshape(height * width, 2 * quarter)


def rotate_patches(x: jax.Array, angles: jax.Array) -> jax.Array:
  """Rotates the channel pairs (i, i + H / 2) of the patch tokens; tokens before the patches are unchanged.

  Args:
    x: float[B, T, N, H].
    angles: float32[patches, H / 2], of the last tokens.
  """
  num_before = x.shape[1] - angles.shape[0]
  cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
  first, second = jnp.split(x[:, num_before:].astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return jnp.concatenate([x[:, :num_before], turned.astype(x.dtype)], axis=1)


class DINOv3(nnx.Module):
  """A DINOv3 model; its output is the class token."""

  def __init__(self, config: DINOv3Config, *, rngs: nnx.Rngs):
    width = config.width
    normal = nnx.initializers.normal(0.02)
    self.patch_embed = Linear(config.patch**2 * 3, width, axes=("patch", "embed"), rngs=rngs)
    self.class_token = nnx.Param(normal(rngs.params(), (width,)), out_sharding=("embed",))
    # Replaces masked patches in pretraining; stored so that an export has every tensor of the original.
    self.mask_token = Buffer(jnp.zeros((width,), jnp.float32), out_sharding=("embed",))
    registers = normal(rngs.params(), (config.num_registers, width))
    self.registers = nnx.Param(registers, out_sharding=(None, "embed"))
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
    x = self.patch_embed(patches(pixels, config.patch))
    first = jnp.concatenate([self.class_token[...][None], self.registers[...]])
    x = prepend(gather(first, None, "embed"), x)
    angles = jnp.asarray(rope_angles(config, pixels.shape[1] // config.patch, pixels.shape[2] // config.patch))
    rotate = functools.partial(rotate_patches, angles=angles)
    return self.encoder(constrain(x, "batch", "act_tokens", "act_embed"), rotate)
