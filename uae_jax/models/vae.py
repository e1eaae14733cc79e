"""AutoencoderKL: the convolutional VAE between images and the latents that the decoder generates.

Source: Rombach et al. 2022 (arXiv 2112.10752); diffusers 0.42 autoencoder_kl.py, vae.py (Encoder, Decoder), resnet.py.
Images and latents are NHWC. Covers what Stable Diffusion 3 uses: no 1x1 convolution on either side of the latents.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from uae_jax.layers.attention import attend
from uae_jax.layers.buffer import Buffer
from uae_jax.layers.conv import Conv, GroupNorm
from uae_jax.layers.lora import Linear
from uae_jax.layers.stack import REMAT_POLICIES

LOG_VAR_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig:
  """Architecture of the VAE; every level but the last halves the image size.

  Attributes:
    block_channels: channels of each level, finest first.
    layers_per_block: residual blocks per level in the VAE encoder; the VAE decoder has one more.
    norm_groups: number of groups in every GroupNorm.
    latent_channels: C.
    image_channels: channels of the images.
    scaling_factor: initial value of `latent_scaling`, the same for every channel.
    shift_factor: initial value of `latent_shift`.
    mid_attention: whether the coarsest level has single-head attention.
    remat: a key of `layers.stack.REMAT_POLICIES`, applied to each residual block.
  """

  block_channels: tuple[int, ...]
  layers_per_block: int
  norm_groups: int
  latent_channels: int = 16
  image_channels: int = 3
  scaling_factor: float = 1.0
  shift_factor: float = 0.0
  mid_attention: bool = True
  remat: str = "none"

  @property
  def downsampling(self) -> int:
    """Image pixels per latent pixel, along each side."""
    return 2 ** (len(self.block_channels) - 1)

  @classmethod
  def sd3(cls) -> "AutoencoderKLConfig":
    """Stable Diffusion 3 and 3.5. Source: stabilityai/stable-diffusion-3.5-large, vae/config.json."""
    return cls(
      block_channels=(128, 256, 512, 512),
      layers_per_block=2,
      norm_groups=32,
      scaling_factor=1.5305,
      shift_factor=0.0609,
    )

  @classmethod
  def from_huggingface(cls, config: Mapping[str, Any]) -> "AutoencoderKLConfig":
    """Reads the `config.json` of a diffusers AutoencoderKL.

    Raises:
      ValueError: the file describes an unsupported architecture.
    """
    expected = {"use_quant_conv": False, "use_post_quant_conv": False, "latents_mean": None, "latents_std": None}
    defaults = {"use_quant_conv": True, "use_post_quant_conv": True}
    for name, value in (expected | {"act_fn": "silu"}).items():
      if (found := config.get(name, defaults.get(name, value))) != value:
        raise ValueError(f"vae config: {name} is {found!r}, only {value!r} is known")
    channels = tuple(config["block_out_channels"])
    if not channels or any(type(width) is not int or width < 1 for width in channels):
      raise ValueError(f"block_out_channels is {channels}, expected positive integers")
    for name, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
      if (found := list(config.get(name, [block] * len(channels)))) != [block] * len(channels):
        raise ValueError(f"{name} is {found}, expected {block} for each of {len(channels)} levels")
    if config.get("out_channels", config["in_channels"]) != config["in_channels"]:
      raise ValueError(f"out_channels {config['out_channels']} is not in_channels {config['in_channels']}")
    if not config["scaling_factor"]:
      raise ValueError("scaling_factor is 0 or null")
    if any(width % config["norm_num_groups"] for width in channels):
      raise ValueError(f"norm_num_groups {config['norm_num_groups']} does not divide block_out_channels {channels}")
    return cls(
      block_channels=channels,
      layers_per_block=config["layers_per_block"],
      norm_groups=config["norm_num_groups"],
      latent_channels=config["latent_channels"],
      image_channels=config["in_channels"],
      scaling_factor=config["scaling_factor"],
      shift_factor=config.get("shift_factor") or 0.0,
      mid_attention=config.get("mid_block_add_attention", True),
    )


def inputs_spec(config: AutoencoderKLConfig, batch: int, height: int, width: int, dtype=jnp.float32) -> dict:
  """Shapes of the inputs of `encode` (images) and `decode` (latents), by name; height and width in image pixels."""
  factor = config.downsampling
  return {
    "images": jax.ShapeDtypeStruct((batch, height, width, config.image_channels), dtype),
    "latents": jax.ShapeDtypeStruct((batch, height // factor, width // factor, config.latent_channels), dtype),
  }


class ResnetBlock(nnx.Module):
  """Twice norm, SiLU and convolution, plus a shortcut: float[B, H, W, in] -> float[B, H, W, out]."""

  def __init__(self, in_channels: int, out_channels: int, groups: int, *, rngs: nnx.Rngs):
    self.norm1 = GroupNorm(in_channels, groups)
    self.conv1 = Conv(in_channels, out_channels, rngs=rngs)
    self.norm2 = GroupNorm(out_channels, groups)
    self.conv2 = Conv(out_channels, out_channels, rngs=rngs)
    self.has_shortcut = in_channels != out_channels
    if self.has_shortcut:
      self.shortcut = Conv(in_channels, out_channels, size=1, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    y = self.conv1(jax.nn.silu(self.norm1(x)))
    y = self.conv2(jax.nn.silu(self.norm2(y)))
    return (self.shortcut(x) if self.has_shortcut else x) + y


class PixelAttention(nnx.Module):
  """Single-head self-attention over all pixels, added to its input: float[B, H, W, D] -> float[B, H, W, D]."""

  def __init__(self, width: int, groups: int, *, rngs: nnx.Rngs):
    self.norm = GroupNorm(width, groups)
    self.query = Linear(width, width, axes=("embed", None), rngs=rngs)
    self.key = Linear(width, width, axes=("embed", None), rngs=rngs)
    self.value = Linear(width, width, axes=("embed", None), rngs=rngs)
    self.out = Linear(width, width, axes=("embed", None), rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    batch, height, width, channels = x.shape
    y = self.norm(x).reshape(batch, height * width, 1, channels)
    y = attend(self.query(y), self.key(y), self.value(y))
    return x + self.out(y.reshape(x.shape))


class Middle(nnx.Module):
  """The coarsest level: a residual block, attention, a residual block."""

  def __init__(self, config: AutoencoderKLConfig, *, rngs: nnx.Rngs):
    width = config.block_channels[-1]
    self.resnet1 = ResnetBlock(width, width, config.norm_groups, rngs=rngs)
    if config.mid_attention:
      self.attention = PixelAttention(width, config.norm_groups, rngs=rngs)
    self.resnet2 = ResnetBlock(width, width, config.norm_groups, rngs=rngs)
    self.config = config

  def __call__(self, x: jax.Array) -> jax.Array:
    x = run(self.resnet1, x, self.config.remat)
    if self.config.mid_attention:
      x = self.attention(x)
    return run(self.resnet2, x, self.config.remat)


class Level(nnx.Module):
  """Residual blocks at one resolution, then a change of resolution: `resize` is "down", "up", or "" for none."""

  def __init__(
    self, in_channels: int, out_channels: int, depth: int, resize: str, config: AutoencoderKLConfig, *, rngs: nnx.Rngs
  ):
    for i in range(depth):
      block = ResnetBlock(out_channels if i else in_channels, out_channels, config.norm_groups, rngs=rngs)
      setattr(self, f"resnet{i}", block)
    if resize == "down":
      # Zero padding only at the right and the bottom: output pixel (i, j) sees (2i..2i+2, 2j..2j+2).
      self.resample = Conv(out_channels, out_channels, stride=2, padding=((0, 1), (0, 1)), rngs=rngs)
    elif resize == "up":
      self.resample = Conv(out_channels, out_channels, rngs=rngs)
    self.depth = depth
    self.resize = resize
    self.remat = config.remat

  def __call__(self, x: jax.Array) -> jax.Array:
    for i in range(self.depth):
      x = run(getattr(self, f"resnet{i}"), x, self.remat)
    if self.resize == "up":
      x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    return self.resample(x) if self.resize else x


class Encoder(nnx.Module):
  """Images to mean and log-variance of the latents: float[B, H, W, 3] -> float[B, h, w, 2 C]."""

  def __init__(self, config: AutoencoderKLConfig, *, rngs: nnx.Rngs):
    channels = config.block_channels
    self.conv_in = Conv(config.image_channels, channels[0], rngs=rngs)
    for i, width in enumerate(channels):
      resize = "down" if i < len(channels) - 1 else ""
      level = Level(channels[max(i - 1, 0)], width, config.layers_per_block, resize, config, rngs=rngs)
      setattr(self, f"level{i}", level)
    self.middle = Middle(config, rngs=rngs)
    self.norm_out = GroupNorm(channels[-1], config.norm_groups)
    self.conv_out = Conv(channels[-1], 2 * config.latent_channels, rngs=rngs)
    self.num_levels = len(channels)

  def __call__(self, images: jax.Array) -> jax.Array:
    x = self.conv_in(images)
    for i in range(self.num_levels):
      x = getattr(self, f"level{i}")(x)
    return self.conv_out(jax.nn.silu(self.norm_out(self.middle(x))))


class Decoder(nnx.Module):
  """Latents to images: float[B, h, w, C] -> float[B, H, W, 3]. Level 0 is the coarsest, as in the checkpoints."""

  def __init__(self, config: AutoencoderKLConfig, *, rngs: nnx.Rngs):
    channels = config.block_channels[::-1]
    self.conv_in = Conv(config.latent_channels, channels[0], rngs=rngs)
    self.middle = Middle(config, rngs=rngs)
    for i, width in enumerate(channels):
      resize = "up" if i < len(channels) - 1 else ""
      level = Level(channels[max(i - 1, 0)], width, config.layers_per_block + 1, resize, config, rngs=rngs)
      setattr(self, f"level{i}", level)
    self.norm_out = GroupNorm(channels[-1], config.norm_groups)
    self.conv_out = Conv(channels[-1], config.image_channels, rngs=rngs)
    self.num_levels = len(channels)

  def __call__(self, latents: jax.Array) -> jax.Array:
    x = self.middle(self.conv_in(latents))
    for i in range(self.num_levels):
      x = getattr(self, f"level{i}")(x)
    return self.conv_out(jax.nn.silu(self.norm_out(x)))


class AutoencoderKL(nnx.Module):
  """VAE encoder and decoder, and the affine map between the encoder's latents and those the flow is trained on.

  `latent_scaling` and `latent_shift` are buffers of shape [C]: stored with the parameters and never trained. They can
  be replaced by per-channel values, measured after training, without retracing.
  """

  def __init__(self, config: AutoencoderKLConfig, *, rngs: nnx.Rngs):
    self.encoder = Encoder(config, rngs=rngs)
    self.decoder = Decoder(config, rngs=rngs)
    shape = (config.latent_channels,)
    self.latent_scaling = Buffer(jnp.full(shape, config.scaling_factor, jnp.float32), out_sharding=(None,))
    self.latent_shift = Buffer(jnp.full(shape, config.shift_factor, jnp.float32), out_sharding=(None,))
    self.config = config

  def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The posterior of the latents, unscaled.

    Args:
      images: float[B, H, W, 3] in [-1, 1]; sides multiples of `config.downsampling`.

    Returns:
      (mean, log-variance clamped to [-30, 20]), each float[B, h, w, C].

    Raises:
      ValueError: a side of the images is not a multiple of `config.downsampling`.
    """
    factor = self.config.downsampling
    if images.shape[1] % factor or images.shape[2] % factor:
      raise ValueError(f"images of {images.shape[1:3]} pixels do not divide by {factor}")
    mean, log_var = jnp.split(self.encoder(images), 2, axis=-1)
    return mean, jnp.clip(log_var, *LOG_VAR_RANGE)

  def to_latents(self, mean: jax.Array) -> jax.Array:
    """(mean - shift) * scaling, in the dtype of `mean`: the latents that the MMDiT generates."""
    latents = (mean.astype(jnp.float32) - self.latent_shift[...]) * self.latent_scaling[...]
    return latents.astype(mean.dtype)

  def decode(self, latents: jax.Array) -> jax.Array:
    """Images from scaled latents: float[B, h, w, C] -> float[B, H, W, 3], nominally in [-1, 1], not clamped."""
    unscaled = latents.astype(jnp.float32) / self.latent_scaling[...] + self.latent_shift[...]
    return self.decoder(unscaled.astype(latents.dtype))


def run(block: ResnetBlock, x: jax.Array, remat: str) -> jax.Array:
  """block(x), rematerialized in the backward pass under the policy named `remat`."""
  policy = REMAT_POLICIES[remat]
  if policy is None:
    return block(x)
  graphdef, state = nnx.split(block)
  return jax.checkpoint(lambda state, x: nnx.merge(graphdef, state)(x), policy=policy)(state, x)
