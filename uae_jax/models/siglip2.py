"""SigLIP 2 at fixed resolution: an image tower with attention pooling and a text tower with a common embedding space.

Source: Tschannen et al. 2025 (arXiv 2502.14786), Zhai et al. 2023 (arXiv 2303.15343); transformers 5.23
modeling_siglip.py, the architecture of all published checkpoints except the NaFlex ones. Letters: see
layers/__init__.py; E is the width of the embedding space.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from uae_jax.layers.attention import attend
from uae_jax.layers.lora import Linear
from uae_jax.layers.norms import LayerNorm
from uae_jax.models.vit import MLP, Encoder, PatchTower, PatchTowerConfig, Projections, ViTConfig
from uae_jax.sharding import constrain, gather

# Source: Zhai et al. 2023, section 3.2.
INITIAL_LOGIT_SCALE = math.log(10)
INITIAL_LOGIT_BIAS = -10.0
ACTIVATION = "gelu_pytorch_tanh"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SigLIP2VisionConfig(PatchTowerConfig):
  """Architecture of the image tower; E is its width."""

  activation: str = ACTIVATION

  @classmethod
  def siglip2_base(cls, image_px: int = 224, patch: int = 16) -> "SigLIP2VisionConfig":
    """Source: google/siglip2-base-patch16-224, config.json."""
    return cls(image_px=image_px, patch=patch, width=768, depth=12, num_heads=12, mlp_width=3072)

  @classmethod
  def siglip2_so400m(cls, image_px: int = 384, patch: int = 14) -> "SigLIP2VisionConfig":
    """Source: google/siglip2-so400m-patch14-384, config.json."""
    return cls(image_px=image_px, patch=patch, width=1152, depth=27, num_heads=16, mlp_width=4304)

  @classmethod
  def from_huggingface(cls, config: Mapping[str, Any]) -> "SigLIP2VisionConfig":
    """Reads a transformers SiglipVisionConfig dict; absent fields get the defaults of transformers.

    Raises:
      ValueError: the dict describes an unsupported architecture.
    """
    if "num_patches" in config:
      raise ValueError("vision_config.num_patches is of a NaFlex checkpoint; expected one of fixed resolution")
    if not config.get("vision_use_head", True):
      raise ValueError("vision_config.vision_use_head is false; expected the attention-pooling head")
    image_px, patch = config.get("image_size", 224), config.get("patch_size", 16)
    if not isinstance(image_px, int) or not isinstance(patch, int):
      raise ValueError(f"vision_config has image_size {image_px} and patch_size {patch}; expected squares")
    return cls(image_px=image_px, patch=patch, **_encoder_fields(config))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SigLIP2TextConfig(ViTConfig):
  """Architecture of the text tower.

  Attributes:
    vocab_size: V.
    max_tokens: number of rows of the position table; texts are padded to this length.
    projection_width: E.
  """

  vocab_size: int
  max_tokens: int
  projection_width: int
  activation: str = ACTIVATION
  norm_eps: float = 1e-6

  @classmethod
  def siglip2_base(cls) -> "SigLIP2TextConfig":
    """Source: google/siglip2-base-patch16-224, config.json."""
    return cls(
      vocab_size=256_000, max_tokens=64, width=768, depth=12, num_heads=12, mlp_width=3072, projection_width=768
    )

  @classmethod
  def siglip2_so400m(cls) -> "SigLIP2TextConfig":
    """Source: google/siglip2-so400m-patch14-384, config.json."""
    return cls(
      vocab_size=256_000, max_tokens=64, width=1152, depth=27, num_heads=16, mlp_width=4304, projection_width=1152
    )

  @classmethod
  def from_huggingface(cls, config: Mapping[str, Any]) -> "SigLIP2TextConfig":
    """Reads a transformers SiglipTextConfig dict; absent fields get the defaults of transformers."""
    fields = _encoder_fields(config)
    return cls(
      vocab_size=config.get("vocab_size", 32_000),
      max_tokens=config.get("max_position_embeddings", 64),
      projection_width=config.get("projection_size") or fields["width"],
      **fields,
    )


@dataclasses.dataclass(frozen=True)
class SigLIP2Config:
  """Architecture of both towers.

  Raises:
    ValueError: the towers do not have the same output width.
  """

  vision: SigLIP2VisionConfig
  text: SigLIP2TextConfig

  def __post_init__(self):
    vision, text = self.vision.width, self.text.projection_width
    if vision != text:
      raise ValueError(f"the vision tower has width {vision}, the text tower projection_width {text}; expected equals")

  @classmethod
  def siglip2_base(cls, image_px: int = 224, patch: int = 16) -> "SigLIP2Config":
    return cls(SigLIP2VisionConfig.siglip2_base(image_px, patch), SigLIP2TextConfig.siglip2_base())

  @classmethod
  def siglip2_so400m(cls, image_px: int = 384, patch: int = 14) -> "SigLIP2Config":
    return cls(SigLIP2VisionConfig.siglip2_so400m(image_px, patch), SigLIP2TextConfig.siglip2_so400m())

  @classmethod
  def from_huggingface(cls, config: Mapping[str, Any]) -> "SigLIP2Config":
    """Reads the `config.json` of a transformers SiglipModel.

    Raises:
      ValueError: the file belongs to another model, such as a NaFlex checkpoint.
    """
    kind = config.get("model_type", "siglip")
    if kind == "siglip2":
      raise ValueError(
        "model_type siglip2 is a NaFlex checkpoint, which is not supported; use one of fixed resolution, such as "
        "google/siglip2-base-patch16-224"
      )
    if kind != "siglip":
      raise ValueError(f"model_type is {kind!r}, expected 'siglip'")
    return cls(
      SigLIP2VisionConfig.from_huggingface(config.get("vision_config") or {}),
      SigLIP2TextConfig.from_huggingface(config.get("text_config") or {}),
    )


def _encoder_fields(config: Mapping[str, Any]) -> dict[str, Any]:
  """Fields of `ViTConfig` from a Hugging Face dict."""
  return {
    "width": config.get("hidden_size", 768),
    "depth": config.get("num_hidden_layers", 12),
    "num_heads": config.get("num_attention_heads", 12),
    "mlp_width": config.get("intermediate_size", 3072),
    "activation": config.get("hidden_act", ACTIVATION),
    "norm_eps": config.get("layer_norm_eps", 1e-6),
  }


class PooledAttention(Projections):
  """Attention of one query per image over all patches: float[B, 1, D] and float[B, S, D] -> float[B, 1, D]."""

  def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
    def heads(y: jax.Array) -> jax.Array:
      y = y.reshape(*y.shape[:-1], self.config.num_heads, self.config.head_width)
      return constrain(y, "batch", "act_tokens", "act_heads", None)

    q, k, v = heads(self.query(x)), heads(self.key(context)), heads(self.value(context))
    # With one query there are few logits, so a blocked kernel would save nothing.
    return self.out(attend(q, k, v, backend="xla").reshape(x.shape))


class PoolingHead(nnx.Module):
  """Pools all patches with a learned query: float[B, T, D] -> float[B, D]."""

  def __init__(self, config: SigLIP2VisionConfig, *, rngs: nnx.Rngs):
    probe = nnx.initializers.normal(0.02)(rngs.params(), (config.width,))
    self.probe = nnx.Param(probe, out_sharding=("embed",))
    self.attention = PooledAttention(config, rngs=rngs)
    self.norm = LayerNorm(config.width, eps=config.norm_eps)
    self.mlp = MLP(config, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    probe = gather(self.probe[...], "embed").astype(x.dtype)
    pooled = self.attention(jnp.broadcast_to(probe, (x.shape[0], 1, x.shape[-1])), x)
    return (pooled + self.mlp(self.norm(pooled)))[:, 0]


class SigLIP2Vision(PatchTower):
  """The image tower with its pooling head."""

  def __init__(self, config: SigLIP2VisionConfig, *, rngs: nnx.Rngs):
    super().__init__(config, rngs=rngs)
    self.pool = PoolingHead(config, rngs=rngs)

  def __call__(self, pixels: jax.Array) -> jax.Array:
    """Image embeddings float[B, E], not normalized; see `PatchTower.patch_states`."""
    return self.pool(self.patch_states(pixels))


class SigLIP2Text(nnx.Module):
  """The text tower with its projection; all tokens attend to all others, including padding."""

  def __init__(self, config: SigLIP2TextConfig, *, rngs: nnx.Rngs):
    width, normal = config.width, nnx.initializers.normal(0.02)
    self.token_embedding = nnx.Param(normal(rngs.params(), (config.vocab_size, width)), out_sharding=("vocab", "embed"))
    self.positions = nnx.Param(normal(rngs.params(), (config.max_tokens, width)), out_sharding=(None, "embed"))
    self.encoder = Encoder(config, rngs=rngs)
    self.norm_out = LayerNorm(width, eps=config.norm_eps)
    self.projection = Linear(width, config.projection_width, axes=("embed", None), rngs=rngs)
    self.config = config

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Text embeddings, not normalized. Computes in the dtype of the token table.

    Args:
      tokens: int32[B, T], T at most `max_tokens`. The last token is pooled, so the published text towers, trained on
        texts padded to `max_tokens`, need that padding.

    Returns:
      float[B, E].

    Raises:
      ValueError: the texts are too long.
    """
    length = tokens.shape[1]
    if length > self.config.max_tokens:
      raise ValueError(f"{length} tokens exceed the {self.config.max_tokens} positions (max_tokens)")
    x = gather(self.token_embedding[...], "vocab", "embed")[tokens]
    x = x + gather(self.positions[:length], None, "embed")
    x = self.encoder(constrain(x, "batch", "act_tokens", "act_embed"))
    return self.projection(self.norm_out(x[:, -1]))


class SigLIP2(nnx.Module):
  """Both towers. The logit of a pair is exp(logit_scale) * cosine + logit_bias, its probability the sigmoid of that."""

  def __init__(self, config: SigLIP2Config, *, rngs: nnx.Rngs):
    self.vision = SigLIP2Vision(config.vision, rngs=rngs)
    self.text = SigLIP2Text(config.text, rngs=rngs)
    self.logit_scale = nnx.Param(jnp.asarray(INITIAL_LOGIT_SCALE, jnp.float32))
    self.logit_bias = nnx.Param(jnp.asarray(INITIAL_LOGIT_BIAS, jnp.float32))
    self.config = config

  def __call__(self, pixels: jax.Array, tokens: jax.Array) -> jax.Array:
    """Logits float32[images, texts] of every pair; arguments as for the towers."""
    images, texts = self.vision(pixels).astype(jnp.float32), self.text(tokens).astype(jnp.float32)
    images, texts = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (images, texts))
    return jnp.exp(self.logit_scale[...]) * images @ texts.T + self.logit_bias[...]
