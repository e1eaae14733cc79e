"""Model sizes of the small world: the real architectures, small enough to train from scratch on two CPU cores."""

import dataclasses

from uae_jax.layers.lora import LoRA
from uae_jax.models.clip import CLIPTextConfig, CLIPVisionConfig
from uae_jax.models.connector import ConnectorConfig
from uae_jax.models.dinov2 import DINOv2Config
from uae_jax.models.language import LanguageConfig
from uae_jax.models.mmdit import MMDiTConfig
from uae_jax.models.qwen25_vl.model import Qwen25VLConfig
from uae_jax.models.qwen25_vl.vision import VisionConfig
from uae_jax.models.uae import UAEConfig
from uae_jax.models.vae import AutoencoderKLConfig

# Names of the small world's models in a config: of 32 px, and of the 48 px of the variant "rich".
SMALL_WORLD, RICH = "scenes", "rich_scenes"
IMAGE_PX, RICH_PX = 32, 48
VAE_CHANNELS = (8, 16, 32, 64)
# A latent of 8 x 8 pixels loses the textures and small objects of the variant "rich".
RICH_VAE_CHANNELS = (8, 16, 32)
WIDTH = 64
EMBEDDING_WIDTH = 64


def rich_uae(vocab_size: int, image_token_id: int, *, rank: int, alpha: float) -> UAEConfig:
  """The UAE of the variant "rich": 48 px images, 36 image tokens, 12 x 12 x 16 latents, 36 patches of 2 x 2 latents.

  With two vision layers, as in `uae`, its captioner tells no size and no texture apart after 2500 steps.
  """
  own = uae(vocab_size, image_token_id, rank=rank, alpha=alpha)
  side = RICH_PX // 2 ** (len(RICH_VAE_CHANNELS) - 1)
  decoder = dataclasses.replace(own.decoder, patch=2, pos_embed_max_size=side // 2, sample_size=side)
  captioner = _captioner(vocab_size, image_token_id, vision_depth=4)
  vae = dataclasses.replace(own.vae, block_channels=RICH_VAE_CHANNELS)
  return dataclasses.replace(own, captioner=captioner, decoder=decoder, vae=vae)


def uae(vocab_size: int, image_token_id: int, *, rank: int = 16, alpha: float = 16.0) -> UAEConfig:
  """A UAE with about a million parameters: 32 px images, 16 image tokens, 4 x 4 x 16 latents, 16 latent patches."""
  decoder = MMDiTConfig(
    depth=4,
    num_heads=2,
    head_width=32,
    patch=1,
    in_channels=16,
    context_width=WIDTH,
    pooled_width=16,
    pos_embed_max_size=IMAGE_PX // 2 ** (len(VAE_CHANNELS) - 1),
    sample_size=IMAGE_PX // 2 ** (len(VAE_CHANNELS) - 1),
    unroll=True,
  )
  captioner = _captioner(vocab_size, image_token_id, vision_depth=2)
  return UAEConfig(
    captioner=captioner,
    connector=ConnectorConfig(in_width=WIDTH, hidden_width=2 * WIDTH, out_width=WIDTH),
    decoder=decoder,
    vae=AutoencoderKLConfig(block_channels=VAE_CHANNELS, layers_per_block=1, norm_groups=4),
    captioner_lora=LoRA(rank, alpha, captioner.adapter_targets),
    decoder_lora=LoRA(rank, alpha),
    mask_context=True,
  )


def _captioner(vocab_size: int, image_token_id: int, *, vision_depth: int) -> Qwen25VLConfig:
  vision = VisionConfig(
    depth=vision_depth,
    width=WIDTH,
    num_heads=2,
    mlp_width=3 * WIDTH,
    out_width=WIDTH,
    patch_size=4,
    spatial_merge=2,
    window_px=16,
    full_attention_layers=tuple(range(1, vision_depth, 2)),
    unroll=True,
  )
  language = LanguageConfig(
    vocab_size=vocab_size,
    width=WIDTH,
    depth=3,
    num_heads=2,
    num_kv_heads=2,
    head_width=32,
    mlp_width=3 * WIDTH,
    rope_theta=1e4,
    mrope_sections=(4, 6, 6),
    ties_embeddings=True,
    unroll=True,
  )
  return Qwen25VLConfig(vision=vision, language=language, image_token_id=image_token_id)


def clip_vision(image_px: int = IMAGE_PX) -> CLIPVisionConfig:
  """The image tower of CLIP, the reward embedder."""
  return CLIPVisionConfig(
    image_px=image_px,
    patch=8,
    width=WIDTH,
    depth=2,
    num_heads=2,
    mlp_width=4 * WIDTH,
    projection_width=EMBEDDING_WIDTH,
    unroll=True,
  )


def clip_text(vocab_size: int, max_tokens: int, end_token_id: int) -> CLIPTextConfig:
  """The text tower that both embedders are trained against; not needed afterwards."""
  return CLIPTextConfig(
    vocab_size=vocab_size,
    max_tokens=max_tokens,
    width=WIDTH,
    depth=2,
    num_heads=2,
    mlp_width=2 * WIDTH,
    projection_width=EMBEDDING_WIDTH,
    eos_token=end_token_id,
    unroll=True,
  )


def dinov2(image_px: int = IMAGE_PX) -> DINOv2Config:
  """The held-out embedder: another architecture and another seed; the class token has the embedding width."""
  return DINOv2Config(
    image_px=image_px, patch=8, width=EMBEDDING_WIDTH, depth=2, num_heads=2, mlp_width=4 * WIDTH, unroll=True
  )


def embedders(image_px: int = IMAGE_PX) -> dict:
  """Kind -> model config, for the embedders that the small world trains from scratch."""
  return {"clip": clip_vision(image_px), "dinov2": dinov2(image_px)}
