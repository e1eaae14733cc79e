"""CLIP: an image tower and a text tower with a common embedding space; also Long-CLIP and the text encoders of SD3.

Source: Radford et al. 2021 (arXiv 2103.00020), transformers 5.23 modeling_clip.py; Zhang et al. 2024 (arXiv 2403.15378)
for the two position tables of Long-CLIP. Letters: see layers/__init__.py; E is the width of the embedding space.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from uae_jax.layers.lora import Linear
from uae_jax.layers.norms import LayerNorm
from uae_jax.models.vit import Encoder, ViTConfig, patches, prepend
from uae_jax.sharding import constrain, gather

# Files written before transformers 4.31 have `eos_token_id: 2` for any vocabulary; their end token has the largest id.
LEGACY_EOS = 2
INITIAL_LOGIT_SCALE = float(np.log(1 / 0.07))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig(ViTConfig):
  """Architecture of the image tower.

  Attributes:
    image_px: side of the square input image, in pixels.
    patch: side of a patch, in pixels.
    projection_width: E.
  """

  image_px: int
  patch: int
  projection_width: int

  @property
  def num_positions(self) -> int:
    """Number of tokens: all patches and the class token."""
    return (self.image_px // self.patch) ** 2 + 1

  @classmethod
  def clip_vit_l14(cls) -> "CLIPVisionConfig":
    """Source: openai/clip-vit-large-patch14, config.json."""
    return cls(
      image_px=224,
      patch=14,
      width=1024,
      depth=24,
      num_heads=16,
      mlp_width=4096,
      activation="quick_gelu",
      projection_width=768,
    )

  @classmethod
  def clip_vit_h14(cls) -> "CLIPVisionConfig":
    """Source: laion/CLIP-ViT-H-14-laion2B-s32B-b79K, config.json; also PickScore and HPS v2."""
    return cls(
      image_px=224,
      patch=14,
      width=1280,
      depth=32,
      num_heads=16,
      mlp_width=5120,
      activation="gelu",
      projection_width=1024,
    )

  @classmethod
  def from_huggingface(cls, config: Mapping[str, Any], projection_width: int | None = None) -> "CLIPVisionConfig":
    """Reads a transformers CLIPVisionConfig dict; absent fields get the defaults of transformers."""
    return cls(
      image_px=config.get("image_size", 224),
      patch=config.get("patch_size", 32),
      projection_width=projection_width or config.get("projection_dim", 512),
      **_encoder_fields(config, width=768, mlp_width=3072, num_heads=12),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPTextConfig(ViTConfig):
  """Architecture of the text tower.

  Attributes:
    vocab_size: V.
    max_tokens: number of rows of the position table.
    projection_width: E.
    eos_token: id of the token whose first occurrence is pooled; `LEGACY_EOS` pools at the largest id of a row.
    position_split: first position that uses the second position table (20 for Long-CLIP); None for a single table.
  """

  vocab_size: int
  max_tokens: int
  projection_width: int
  eos_token: int = LEGACY_EOS
  position_split: int | None = None
  is_causal: bool = True

  @classmethod
  def clip_vit_l14(cls) -> "CLIPTextConfig":
    """The text tower of CLIP-L, also the first one of SD3. Source: openai/clip-vit-large-patch14, config.json."""
    return cls(
      vocab_size=49408,
      max_tokens=77,
      width=768,
      depth=12,
      num_heads=12,
      mlp_width=3072,
      activation="quick_gelu",
      projection_width=768,
    )

  @classmethod
  def clip_vit_h14(cls) -> "CLIPTextConfig":
    """Source: laion/CLIP-ViT-H-14-laion2B-s32B-b79K, config.json."""
    return dataclasses.replace(
      cls.clip_vit_l14(),
      width=1024,
      depth=24,
      num_heads=16,
      mlp_width=4096,
      activation="gelu",
      projection_width=1024,
    )

  @classmethod
  def clip_bigg_text(cls) -> "CLIPTextConfig":
    """The second text tower of SD3. Source: stabilityai/stable-diffusion-3.5-large, text_encoder_2/config.json."""
    return dataclasses.replace(
      cls.clip_vit_l14(),
      width=1280,
      depth=32,
      num_heads=20,
      mlp_width=5120,
      activation="gelu",
      projection_width=1280,
    )

  @classmethod
  def longclip_l(cls) -> "CLIPTextConfig":
    """Source: BeichenZhang/LongCLIP-L, longclip-L.pt."""
    return dataclasses.replace(cls.clip_vit_l14(), max_tokens=248, position_split=20)

  @classmethod
  def from_huggingface(cls, config: Mapping[str, Any], projection_width: int | None = None) -> "CLIPTextConfig":
    """Reads a transformers CLIPTextConfig dict; absent fields get the defaults of transformers."""
    return cls(
      vocab_size=config.get("vocab_size", 49408),
      max_tokens=config.get("max_position_embeddings", 77),
      projection_width=projection_width or config.get("projection_dim", 512),
      eos_token=config.get("eos_token_id", 49407),
      **_encoder_fields(config, width=512, mlp_width=2048, num_heads=8),
    )


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
  """Architecture of both towers.

  Raises:
    ValueError: the towers do not project to the same width.
  """

  vision: CLIPVisionConfig
  text: CLIPTextConfig

  def __post_init__(self):
    vision, text = self.vision.projection_width, self.text.projection_width
    if vision != text:
      raise ValueError(f"projection_width is {vision} in the vision tower and {text} in the text tower")

  @property
  def projection_width(self) -> int:
    """E."""
    return self.vision.projection_width

  @classmethod
  def clip_vit_l14(cls) -> "CLIPConfig":
    return cls(CLIPVisionConfig.clip_vit_l14(), CLIPTextConfig.clip_vit_l14())

  @classmethod
  def clip_vit_h14(cls) -> "CLIPConfig":
    return cls(CLIPVisionConfig.clip_vit_h14(), CLIPTextConfig.clip_vit_h14())

  @classmethod
  def longclip_l(cls) -> "CLIPConfig":
    return cls(CLIPVisionConfig.clip_vit_l14(), CLIPTextConfig.longclip_l())

  @classmethod
  def from_huggingface(cls, config: Mapping[str, Any]) -> "CLIPConfig":
    """Reads the `config.json` of a transformers CLIPModel."""
    width = config.get("projection_dim", 512)
    return cls(
      CLIPVisionConfig.from_huggingface(config.get("vision_config") or {}, width),
      CLIPTextConfig.from_huggingface(config.get("text_config") or {}, width),
    )


def _encoder_fields(config: Mapping[str, Any], *, width: int, mlp_width: int, num_heads: int) -> dict[str, Any]:
  """Fields of `ViTConfig` from a Hugging Face dict; the arguments are the defaults, which differ between the towers."""
  return {
    "width": config.get("hidden_size", width),
    "depth": config.get("num_hidden_layers", 12),
    "num_heads": config.get("num_attention_heads", num_heads),
    "mlp_width": config.get("intermediate_size", mlp_width),
    "activation": config.get("hidden_act", "quick_gelu"),
    "norm_eps": config.get("layer_norm_eps", 1e-5),
  }


class CLIPVision(nnx.Module):
  """The image tower with its projection."""

  def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs):
    width = config.width
    normal = nnx.initializers.normal
    self.patch_embed = Linear(config.patch**2 * 3, width, axes=("patch", "embed"), use_bias=False, rngs=rngs)
    self.class_token = nnx.Param(normal(width**-0.5)(rngs.params(), (width,)), out_sharding=("embed",))
    positions = normal(0.02)(rngs.params(), (config.num_positions, width))
    self.positions = nnx.Param(positions, out_sharding=(None, "embed"))
    self.norm_in = LayerNorm(width, eps=config.norm_eps)
    self.encoder = Encoder(config, rngs=rngs)
    self.norm_out = LayerNorm(width, eps=config.norm_eps)
    self.projection = Linear(width, config.projection_width, axes=("embed", None), use_bias=False, rngs=rngs)
    self.config = config

  def __call__(self, pixels: jax.Array) -> jax.Array:
    """Image embeddings, not normalized. Computes in the dtype of `pixels`.

    Args:
      pixels: float[B, image_px, image_px, 3], normalized with CLIP's mean and standard deviation.

    Returns:
      float[B, E].

    Raises:
      ValueError: the images have a different size.
    """
    return self.projection(self.norm_out(self._states(pixels)[:, 0]))

  def patch_states(self, pixels: jax.Array) -> jax.Array:
    """States of the patches in raster order after the final norm: float[B, patches, D]; `pixels` as for a call."""
    return self.norm_out(self._states(pixels)[:, 1:])

  def _states(self, pixels: jax.Array) -> jax.Array:
    """States of class token and patches before the final norm."""
    size = self.config.image_px
    if pixels.shape[1:] != (size, size, 3):
      raise ValueError(f"pixels of shape {pixels.shape}, expected [B, {size}, {size}, 3] (image_px)")
    x = prepend(gather(self.class_token[...], "embed"), self.patch_embed(patches(pixels, self.config.patch)))
    x = self.norm_in(x + gather(self.positions[...], None, "embed").astype(x.dtype))
    return self.encoder(constrain(x, "batch", "act_tokens", "act_embed"))


class CLIPText(nnx.Module):
  """The text tower with its projection; its output is also the pooled embedding that SD3 is conditioned on."""

  def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
    width = config.width
    normal = nnx.initializers.normal
    self.token_embedding = nnx.Param(
      normal(0.02)(rngs.params(), (config.vocab_size, width)), out_sharding=("vocab", "embed")
    )
    table = (config.max_tokens, width)
    self.positions = nnx.Param(normal(0.02)(rngs.params(), table), out_sharding=(None, "embed"))
    if config.position_split is not None:
      self.late_positions = nnx.Param(normal(0.02)(rngs.params(), table), out_sharding=(None, "embed"))
    self.encoder = Encoder(config, rngs=rngs)
    self.norm_out = LayerNorm(width, eps=config.norm_eps)
    self.projection = Linear(width, config.projection_width, axes=("embed", None), use_bias=False, rngs=rngs)
    self.config = config

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Text embeddings, not normalized. Computes in the dtype of the token table.

    Args:
      tokens: int32[B, T], T at most `max_tokens`; tokens after the pooled one have no effect.

    Returns:
      float[B, E].

    Raises:
      ValueError: the texts are too long.
    """
    config, length = self.config, tokens.shape[1]
    if length > config.max_tokens:
      raise ValueError(f"{length} tokens exceed the {config.max_tokens} positions (max_tokens)")
    positions = self.positions[...]
    if config.position_split is not None:
      positions = jnp.concatenate([positions[: config.position_split], self.late_positions[config.position_split :]])
    x = gather(self.token_embedding[...], "vocab", "embed")[tokens] + gather(positions[:length], None, "embed")
    x = self.encoder(constrain(x, "batch", "act_tokens", "act_embed"))
    # argmax returns the first maximum.
    place = jnp.argmax(tokens if config.eos_token == LEGACY_EOS else tokens == config.eos_token, axis=1)
    pooled = jnp.take_along_axis(x, place[:, None, None], axis=1)[:, 0]
    return self.projection(self.norm_out(pooled))


class CLIP(nnx.Module):
  """Both towers and the temperature of their cosine similarities, exp(logit_scale)."""

  def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
    self.vision = CLIPVision(config.vision, rngs=rngs)
    self.text = CLIPText(config.text, rngs=rngs)
    self.logit_scale = nnx.Param(jnp.asarray(INITIAL_LOGIT_SCALE, jnp.float32))
    self.config = config
