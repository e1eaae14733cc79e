"""UAE: an autoencoder whose latent is text, as one module over captioner, connector, decoder and VAE.

Source: arXiv 2509.09666 section 3, and the inference code of PKU-YuanGroup/UAE for prompts, connector and conditioning.
"""

import dataclasses
from typing import Annotated, ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

from uae_jax.layers import lora
from uae_jax.layers.buffer import Buffer
from uae_jax.models import captioners
from uae_jax.models.captioner import Captioner, CaptionerConfig
from uae_jax.models.connector import Connector, ConnectorConfig
from uae_jax.models.mmdit import MMDiT, MMDiTConfig
from uae_jax.models.qwen25_vl.model import Qwen25VLConfig
from uae_jax.models.vae import AutoencoderKL, AutoencoderKLConfig
from uae_jax.plain import ByKind


@dataclasses.dataclass(frozen=True)
class UAEConfig:
  """Architectures of the models, and their adapters.

  Attributes:
    captioner: vision tower and language model; its class is one of `models.captioners.CONFIGS`.
    connector: maps language states to the decoder's context.
    decoder: the MMDiT.
    vae: maps images to latents and back.
    captioner_lora: adapters of the captioner, or None.
    decoder_lora: adapters of the decoder, or None.
    mask_context: mask padding of the context in the decoder. The official system attends to it (False).
  """

  captioner: Annotated[CaptionerConfig, ByKind(captioners.CONFIGS, captioners.DEFAULT)]
  connector: ConnectorConfig
  decoder: MMDiTConfig
  vae: AutoencoderKLConfig
  captioner_lora: lora.LoRA | None = None
  decoder_lora: lora.LoRA | None = None
  mask_context: bool = False

  generates_by_captioner: ClassVar[bool] = False
  inert_options: ClassVar[tuple[str, ...]] = ()

  @classmethod
  def uae_3b_sd35_large(cls, rank: int = 32, alpha: float = 64.0) -> "UAEConfig":
    """The paper's system: Qwen2.5-VL-3B and SD3.5-large, adapters of rank 32 (uae_reference: alpha 64)."""
    captioner = Qwen25VLConfig.qwen25_vl_3b()
    return cls(
      captioner=captioner,
      connector=ConnectorConfig.uae(),
      decoder=MMDiTConfig.sd35_large(),
      vae=AutoencoderKLConfig.sd3(),
      captioner_lora=lora.LoRA(rank, alpha, captioner.adapter_targets),
      decoder_lora=lora.LoRA(rank, alpha),
    )

  @classmethod
  def uae_3b_sd35_medium(cls, rank: int = 32, alpha: float = 64.0) -> "UAEConfig":
    """The paper's system with SD3.5-medium, the decoder of Flow-GRPO's published settings, instead of SD3.5-large."""
    return dataclasses.replace(cls.uae_3b_sd35_large(rank, alpha), decoder=MMDiTConfig.sd35_medium())

  @property
  def masks_padding(self) -> bool:
    return self.mask_context

  @property
  def heads(self) -> dict[str, int]:
    return {**self.captioner.heads, "decoder": self.decoder.num_heads}

  def build(self, rngs: nnx.Rngs) -> "UAE":
    """The module of these sizes, with random weights."""
    return UAE(self, rngs=rngs)

  def with_remat(self, policy: str) -> "UAEConfig":
    """A copy with the rematerialization policy `policy` in captioner, decoder and VAE."""
    return dataclasses.replace(
      self,
      captioner=self.captioner.with_remat(policy),
      decoder=dataclasses.replace(self.decoder, remat=policy),
      vae=dataclasses.replace(self.vae, remat=policy),
    )

  def with_adapters(self, adapters: lora.LoRA) -> "UAEConfig":
    """A copy with adapters of captioner and decoder where there are none; existing adapters are left unchanged."""
    targets = self.captioner.adapter_targets
    return dataclasses.replace(
      self,
      captioner_lora=self.captioner_lora or lora.LoRA(adapters.rank, adapters.alpha, targets),
      decoder_lora=self.decoder_lora or lora.LoRA(adapters.rank, adapters.alpha),
    )

  def latents_shape(self, height: int, width: int) -> tuple[int, int, int]:
    """Shape (h, w, 16) of the latents of an image of height x width pixels.

    Raises:
      ValueError: the decoder's patches or position table do not allow the size.
    """
    scale = self.vae.downsampling
    stride = scale * self.decoder.patch
    largest = stride * self.decoder.pos_embed_max_size
    if min(height, width) < 1 or height % stride or width % stride or max(height, width) > largest:
      raise ValueError(f"{height} x {width} px: sides must be multiples of {stride}, {stride} to {largest}")
    return height // scale, width // scale, self.vae.latent_channels

  def decoder_tokens(self, height: int, width: int) -> int:
    """Tokens per image of height x width pixels in the decoder."""
    return height * width // (self.vae.downsampling * self.decoder.patch) ** 2


class UAE(nnx.Module):
  """The complete model: `captioner` describes images, `decoder` generates images from the connector's output."""

  def __init__(self, config: UAEConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.captioner: Captioner = config.captioner.build(rngs)
    self.connector = Connector(config.connector, rngs=rngs)
    self.decoder = MMDiT(config.decoder, rngs=rngs)
    self.vae = AutoencoderKL(config.vae, rngs=rngs)
    # CLIP-L and CLIP-bigG pooled embeddings of the empty prompt: the same vector for every image, so it is stored.
    self.pooled = Buffer(jnp.zeros((config.decoder.pooled_width,), jnp.float32))
    if config.captioner_lora is not None:
      assert isinstance(self.captioner, nnx.Module)  # as `CaptionerConfig.build` promises
      lora.attach(self.captioner, config.captioner_lora, rngs=rngs)
    if config.decoder_lora is not None:
      lora.attach(self.decoder, config.decoder_lora, rngs=rngs)

  def encode_text(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """The decoder's context for templated prompts: the connector applied to the captioner's final states.

    Args:
      tokens: int32[B, T], right-padded.
      mask: bool[B, T], False at padding.

    Returns:
      float[B, T, C]; values at padding are defined as well, and the official decoder attends to them.
    """
    captioner = self.captioner
    return self.connector(captioner.states(captioner.embed(tokens), captioner.text_positions(mask), mask))

  def velocity(
    self,
    latents: jax.Array,
    sigma: jax.Array,
    context: jax.Array,
    context_mask: jax.Array | None,
    pooled: jax.Array | None = None,
  ) -> jax.Array:
    """The decoder's prediction of the velocity noise - x, computed in the decoder's dtype, returned in float32.

    Args:
      latents: float[B, h, w, 16], noisy latents.
      sigma: float32[B] or float32[], noise level in [0, 1].
      context: float[B, T, C].
      context_mask: bool[B, T]; used only if `config.mask_context`.
      pooled: float[B, P]; default: the stored embedding of the empty prompt.

    Returns:
      float32[B, h, w, 16].
    """
    dtype = self.decoder.patch_embed.kernel.dtype
    if pooled is None:
      pooled = jnp.broadcast_to(self.pooled[...], (latents.shape[0], self.pooled.shape[-1]))
    timesteps = jnp.broadcast_to(1000.0 * sigma, (latents.shape[0],))
    mask = context_mask if self.config.mask_context else None
    velocity = self.decoder(latents.astype(dtype), timesteps, context.astype(dtype), pooled.astype(dtype), mask)
    return velocity.astype(jnp.float32)

  def encode_image(self, images: jax.Array) -> jax.Array:
    """Scaled latents (the posterior mode): float[B, H, W, 3] in [-1, 1] -> float32[B, h, w, 16]."""
    dtype = self.vae.encoder.conv_in.kernel.dtype
    mean, _ = self.vae.encode(images.astype(dtype))
    return self.vae.to_latents(mean).astype(jnp.float32)

  def decode_latents(self, latents: jax.Array) -> jax.Array:
    """Images from scaled latents: float[B, h, w, 16] -> float32[B, H, W, 3], nominally in [-1, 1], not clamped."""
    dtype = self.vae.encoder.conv_in.kernel.dtype
    return self.vae.decode(latents.astype(dtype)).astype(jnp.float32)

  def autoencode(self, images: jax.Array) -> jax.Array:
    """Images through the VAE: float[B, H, W, 3] in [-1, 1] -> float32 of the same shape, not clamped."""
    return self.decode_latents(self.encode_image(images))

  def latents_shape(self, images: jax.Array) -> tuple[int, int, int]:
    """Shape (h, w, 16) of the latents of images [..., H, W, 3]."""
    factor = self.config.vae.downsampling
    return images.shape[-3] // factor, images.shape[-2] // factor, self.config.vae.latent_channels


def to_signed(images: jax.Array) -> jax.Array:
  """Maps uint8[..., H, W, 3] to float32 in [-1, 1]."""
  return images.astype(jnp.float32) / 127.5 - 1.0


def to_pixels(images: jax.Array) -> jax.Array:
  """Maps float images in [-1, 1] to uint8; the inverse of `to_signed`."""
  return jnp.round(127.5 * (images + 1.0)).astype(jnp.uint8)


def captioner_images(batch: dict) -> jax.Array:
  """The captioner's images uint8[B, h, w, 3]: `captioner_image` if the batch has it, else `image`."""
  return batch["captioner_image"] if "captioner_image" in batch else batch["image"]
