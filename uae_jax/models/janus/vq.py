"""The image tokenizer of Janus: a convolutional autoencoder whose latents are entries of a codebook.

Source: LlamaGen's VQ-16 (Sun et al. 2024, arXiv 2406.06525); transformers 5.23 modeling_janus.py, JanusVQVAE. Images
and latents are NHWC. The blocks are those of `models.vae`; the coarsest level has attention after every block.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from uae_jax.layers.conv import Conv, GroupNorm
from uae_jax.models.vae import PixelAttention, ResnetBlock

NORM_GROUPS = 32


@dataclasses.dataclass(frozen=True)
class VQConfig:
  """Architecture of the image tokenizer; every level but the last halves the image size.

  Attributes:
    block_channels: channels of each level, finest first.
    layers_per_block: residual blocks per level in the encoder; the decoder has one more.
    latent_channels: channels between the convolutions and the codebook's projections.
    num_codes: V, entries of the codebook.
    code_width: width of an entry.
  """

  block_channels: tuple[int, ...]
  layers_per_block: int
  latent_channels: int
  num_codes: int
  code_width: int

  def __post_init__(self):
    if any(width % NORM_GROUPS for width in self.block_channels):
      raise ValueError(f"block_channels {self.block_channels} do not divide into {NORM_GROUPS} groups")

  @property
  def downsampling(self) -> int:
    """Image pixels per token, along each side."""
    return 2 ** (len(self.block_channels) - 1)

  @classmethod
  def vq16(cls) -> "VQConfig":
    """Of Janus-Pro-1B and 7B. Source: deepseek-community/Janus-Pro-1B, config.json, vq_config."""
    return cls((128, 128, 256, 256, 512), layers_per_block=2, latent_channels=256, num_codes=16384, code_width=8)

  @classmethod
  def from_huggingface(cls, config: Mapping[str, Any]) -> "VQConfig":
    """Reads the `vq_config` of a transformers JanusConfig; absent fields get the defaults of transformers.

    Raises:
      ValueError: it describes an unsupported architecture.
    """
    for name, value in {"double_latent": False, "in_channels": 3, "out_channels": 3}.items():
      if (found := config.get(name, value)) != value:
        raise ValueError(f"vq_config.{name} is {found!r}, only {value!r} is known")
    base = config.get("base_channels", 128)
    return cls(
      block_channels=tuple(base * factor for factor in config.get("channel_multiplier", (1, 1, 2, 2, 4))),
      layers_per_block=config.get("num_res_blocks", 2),
      latent_channels=config.get("latent_channels", 256),
      num_codes=config.get("num_embeddings", 16384),
      code_width=config.get("embed_dim", 8),
    )


class Level(nnx.Module):
  """Residual blocks at one resolution, each with attention if `attends`, then a change of resolution.

  `resize` is "down", "up", or "" for none.
  """

  def __init__(self, in_channels: int, out_channels: int, depth: int, *, attends: bool, resize: str, rngs: nnx.Rngs):
    for i in range(depth):
      block = ResnetBlock(out_channels if i else in_channels, out_channels, NORM_GROUPS, rngs=rngs)
      setattr(self, f"resnet{i}", block)
      if attends:
        setattr(self, f"attention{i}", PixelAttention(out_channels, NORM_GROUPS, rngs=rngs))
    if resize == "down":
      # Zero padding only at the right and the bottom, as in `models.vae`.
      self.resample = Conv(out_channels, out_channels, stride=2, padding=((0, 1), (0, 1)), rngs=rngs)
    elif resize == "up":
      self.resample = Conv(out_channels, out_channels, rngs=rngs)
    self.depth, self.attends, self.resize = depth, attends, resize

  def __call__(self, x: jax.Array) -> jax.Array:
    for i in range(self.depth):
      x = getattr(self, f"resnet{i}")(x)
      if self.attends:
        x = getattr(self, f"attention{i}")(x)
    if self.resize == "up":
      x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    return self.resample(x) if self.resize else x


class Middle(nnx.Module):
  """A residual block, attention, a residual block."""

  def __init__(self, width: int, *, rngs: nnx.Rngs):
    self.resnet1 = ResnetBlock(width, width, NORM_GROUPS, rngs=rngs)
    self.attention = PixelAttention(width, NORM_GROUPS, rngs=rngs)
    self.resnet2 = ResnetBlock(width, width, NORM_GROUPS, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.resnet2(self.attention(self.resnet1(x)))


class Convolutions(nnx.Module):
  """Encoder (`is_encoder`) or decoder: levels with a middle at the coarsest, level 0 first in order of computation."""

  def __init__(self, config: VQConfig, *, is_encoder: bool, rngs: nnx.Rngs):
    channels = config.block_channels if is_encoder else config.block_channels[::-1]
    first, last = (3, config.latent_channels) if is_encoder else (config.latent_channels, 3)
    depth, resize = (config.layers_per_block, "down") if is_encoder else (config.layers_per_block + 1, "up")
    coarsest = len(channels) - 1 if is_encoder else 0
    self.conv_in = Conv(first, channels[0], rngs=rngs)
    for i, width in enumerate(channels):
      is_last = i == len(channels) - 1
      level = Level(
        channels[max(i - 1, 0)], width, depth, attends=i == coarsest, resize="" if is_last else resize, rngs=rngs
      )
      setattr(self, f"level{i}", level)
    self.middle = Middle(config.block_channels[-1], rngs=rngs)
    self.norm_out = GroupNorm(channels[-1], NORM_GROUPS)
    self.conv_out = Conv(channels[-1], last, rngs=rngs)
    self.num_levels, self.is_encoder = len(channels), is_encoder

  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.conv_in(x)
    if not self.is_encoder:
      x = self.middle(x)
    for i in range(self.num_levels):
      x = getattr(self, f"level{i}")(x)
    if self.is_encoder:
      x = self.middle(x)
    return self.conv_out(jax.nn.silu(self.norm_out(x)))


class VQ(nnx.Module):
  """Images to tokens and back."""

  def __init__(self, config: VQConfig, *, rngs: nnx.Rngs):
    self.encoder = Convolutions(config, is_encoder=True, rngs=rngs)
    self.decoder = Convolutions(config, is_encoder=False, rngs=rngs)
    self.to_code = Conv(config.latent_channels, config.code_width, size=1, rngs=rngs)
    self.from_code = Conv(config.code_width, config.latent_channels, size=1, rngs=rngs)
    codes = nnx.initializers.normal(config.code_width**-0.5)(rngs.params(), (config.num_codes, config.code_width))
    self.codebook = nnx.Param(codes, out_sharding=(None, None))
    self.config = config

  def latents(self, images: jax.Array) -> jax.Array:
    """Latents before they are rounded to the codebook: float[B, H, W, 3] -> float[B, h, w, code_width].

    Args:
      images: in [-1, 1]; sides multiples of `config.downsampling`.
    """
    return self.to_code(self.encoder(images))

  def encode(self, images: jax.Array) -> jax.Array:
    """The nearest code of every latent: float[B, H, W, 3] in [-1, 1] -> int32[B, h * w], in raster order.

    As in transformers, the stored codes are compared. DeepSeek's code compares directions, which is the same for codes
    of equal length.
    """
    latents = self.latents(images).astype(jnp.float32)
    codebook = self.codebook[...].astype(jnp.float32)
    latents = latents.reshape(latents.shape[0], -1, latents.shape[-1])
    # |z|^2 is the same for all codes.
    distances = jnp.sum(jnp.square(codebook), axis=-1) - 2 * latents @ codebook.T
    return jnp.argmin(distances, axis=-1).astype(jnp.int32)

  def codes(self, tokens: jax.Array) -> jax.Array:
    """Entries of the codebook with length 1: int32[...] -> float[..., code_width]."""
    codes = self.codebook[...][tokens]
    length = jnp.linalg.norm(codes.astype(jnp.float32), axis=-1, keepdims=True)
    return (codes / jnp.maximum(length, 1e-12)).astype(codes.dtype)

  def decode(self, tokens: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Images from tokens: int32[B, h * w] and grid (h, w) -> float[B, H, W, 3], nominally in [-1, 1], not clamped.

    Raises:
      ValueError: the number of tokens is not that of the grid.
    """
    if tokens.shape[1] != grid[0] * grid[1]:
      raise ValueError(f"{tokens.shape[1]} image tokens do not fill a grid of {grid[0]} x {grid[1]}")
    codes = self.codes(tokens)
    return self.decoder(self.from_code(codes.reshape(len(codes), *grid, -1)))
