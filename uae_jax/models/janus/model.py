"""The complete Janus-Pro: one language model for captions and for image tokens.

Source: Chen et al. 2025 (arXiv 2501.17811); transformers 5.23 modeling_janus.py, JanusForConditionalGeneration. As a
`models.captioner.Captioner` it reads images; `rollouts.image_tokens` continues prompts with images.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from uae_jax.layers.lora import Linear
from uae_jax.models.janus.vision import Aligner, siglip_large, tower_from_huggingface
from uae_jax.models.janus.vq import VQ, VQConfig
from uae_jax.models.language import LanguageConfig, LanguageModel
from uae_jax.models.language_captioner import LanguageCaptioner, LanguageCaptionerConfig
from uae_jax.models.positions import text_positions
from uae_jax.models.prompts import Prompts, Questions, fill_image
from uae_jax.models.vit import ACTIVATIONS, PatchTower, PatchTowerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class JanusConfig(LanguageCaptionerConfig):
  """Architecture of all parts; an image has as many tokens to be read as to be written.

  Positions of the language model are plain: a single section of M-RoPE.

  Attributes:
    vq: architecture of the image tokenizer.
    vision_depth: number of linear layers between the tower and the language model.
    image_depth: number of linear layers between the embeddings of image tokens and the language model.
    image_head_width: width of the hidden layer of the head of image tokens.
  """

  vision: PatchTowerConfig
  vq: VQConfig
  vision_depth: int = 2
  image_depth: int = 2
  image_head_width: int

  @classmethod
  def janus_pro_1b(cls) -> "JanusConfig":
    """Source: config.json of deepseek-community/Janus-Pro-1B."""
    return cls._published(width=2048, depth=24, num_heads=16, mlp_width=5632)

  @classmethod
  def janus_pro_7b(cls) -> "JanusConfig":
    """Source: config.json of deepseek-community/Janus-Pro-7B."""
    return cls._published(width=4096, depth=30, num_heads=32, mlp_width=11008)

  @classmethod
  def _published(cls, *, width: int, depth: int, num_heads: int, mlp_width: int) -> "JanusConfig":
    language = LanguageConfig(
      vocab_size=102400,
      width=width,
      depth=depth,
      num_heads=num_heads,
      num_kv_heads=num_heads,
      head_width=128,
      mlp_width=mlp_width,
      rope_theta=1e4,
      mrope_sections=(64, 0, 0),
      qkv_bias=False,
    )
    return cls(
      vision=siglip_large(),
      language=language,
      vq=VQConfig.vq16(),
      image_head_width=width,
      image_token_id=100581,
    )

  @classmethod
  def from_huggingface(cls, config: Mapping[str, Any]) -> "JanusConfig":
    """Reads the `config.json` of a transformers JanusForConditionalGeneration.

    Raises:
      ValueError: the file describes an unsupported architecture, or parts that do not fit.
    """
    if (kind := config.get("model_type", "janus")) != "janus":
      raise ValueError(f"model_type is {kind!r}, expected 'janus'")
    vision, vq = config.get("vision_config") or {}, config.get("vq_config") or {}
    language = _language(config.get("text_config") or {}, ties=config.get("tie_word_embeddings", True))
    widths = {
      "vision_config.projection_dim": vision.get("projection_dim", 2048),
      "vq_config.projection_dim": vq.get("projection_dim", 2048),
      "vq_config.image_token_embed_dim": vq.get("image_token_embed_dim", 2048),
    }
    for name, width in widths.items():
      if width != language.width:
        raise ValueError(f"{name} is {width}, the language model has width {language.width}")
    for name, section in (("vision_config", vision), ("vq_config", vq)):
      if section.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"{name}.hidden_act {section['hidden_act']!r} is not known; expected 'gelu'")
    return cls(
      vision=tower_from_huggingface(vision),
      language=language,
      vq=VQConfig.from_huggingface(vq),
      vision_depth=vision.get("depth", 2),
      image_depth=vq.get("num_hidden_layers", 2),
      image_head_width=language.width,
      image_token_id=config.get("image_token_id", 100581),
    )

  @classmethod
  def from_deepseek(cls, config: Mapping[str, Any], image_token_id: int = 100581) -> "JanusConfig":
    """Reads the `config.json` of deepseek-ai/Janus-Pro-1B or 7B, which does not repeat the published defaults.

    Args:
      config: the file.
      image_token_id: id of `<image_placeholder>`, which only the tokenizer knows.

    Raises:
      ValueError: the file describes an unsupported architecture, or parts that do not fit.
    """
    if (kind := config.get("model_type")) != "multi_modality":
      raise ValueError(f"model_type is {kind!r}, expected 'multi_modality'")
    sections = ("vision_config", "aligner_config", "gen_vision_config", "gen_aligner_config", "gen_head_config")
    vision, aligner, vq, vq_aligner, head = ((config.get(name) or {}).get("params") or {} for name in sections)
    if (model := vision.get("model_name", "siglip_large_patch16_384")) != "siglip_large_patch16_384":
      raise ValueError(f"vision_config.params.model_name is {model!r}, only 'siglip_large_patch16_384' is known")
    language = config.get("language_config") or {}
    found = cls.from_huggingface(
      {
        "text_config": {"model_type": "llama", **language},
        "vision_config": {
          "image_size": vision.get("image_size", 384),
          "projection_dim": aligner.get("n_embed", 2048),
          "depth": aligner.get("depth", 2),
        },
        "vq_config": {
          "embed_dim": vq.get("n_embed", 8),
          "num_embeddings": vq.get("image_token_size", 16384),
          "projection_dim": vq_aligner.get("n_embed", 2048),
          "num_hidden_layers": vq_aligner.get("depth", 2),
          "image_token_embed_dim": head.get("n_embed", 2048),
        },
        "image_token_id": image_token_id,
        "tie_word_embeddings": language.get("tie_word_embeddings", False),
      }
    )
    if (hidden := head.get("image_token_embed", found.image_head_width)) != found.image_head_width:
      raise ValueError(f"gen_head_config.params.image_token_embed is {hidden}, expected {found.image_head_width}")
    return found

  @property
  def patch_size(self) -> int:
    return self.vision.patch

  @property
  def image_grid(self) -> tuple[int, int]:
    """(rows, columns) of the tokens of an image, read or written."""
    return self.vision.grid, self.vision.grid

  @property
  def num_image_tokens(self) -> int:
    """Tokens per image, read or written."""
    return self.vision.grid**2

  def build(self, rngs: nnx.Rngs) -> "Janus":
    """The module of these sizes, with random weights."""
    return Janus(self, rngs=rngs)


def _language(text: Mapping[str, Any], *, ties: bool) -> LanguageConfig:
  """The LLaMA of a `text_config`; absent fields get the defaults of transformers.

  Raises:
    ValueError: it describes an unsupported architecture.
  """
  rope = text.get("rope_parameters") or {"rope_theta": text.get("rope_theta", 1e4)} | (text.get("rope_scaling") or {})
  expected = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
  for name, value in expected.items():
    if (found := text.get(name, value)) != value:
      raise ValueError(f"text_config.{name} is {found!r}, only {value!r} is known")
  if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
    raise ValueError(f"text_config: rope type {kind!r} is not known; expected 'default'")
  width, num_heads = text.get("hidden_size", 4096), text.get("num_attention_heads", 32)
  head_width = text.get("head_dim") or width // num_heads
  return LanguageConfig(
    vocab_size=text.get("vocab_size", 32000),
    width=width,
    depth=text.get("num_hidden_layers", 32),
    num_heads=num_heads,
    num_kv_heads=text.get("num_key_value_heads") or num_heads,
    head_width=head_width,
    mlp_width=text.get("intermediate_size", 11008),
    rope_theta=rope.get("rope_theta", 1e4),
    mrope_sections=(head_width // 2, 0, 0),
    ties_embeddings=ties,
    qkv_bias=False,
    norm_eps=text.get("rms_norm_eps", 1e-6),
  )


class ImageHead(nnx.Module):
  """Logits of the next image token: float[..., D] -> float32[..., num_codes]."""

  def __init__(self, config: JanusConfig, *, rngs: nnx.Rngs):
    width, hidden = config.language.width, config.image_head_width
    self.hidden = Linear(width, hidden, axes=("embed", "mlp"), rngs=rngs)
    self.out = Linear(hidden, config.vq.num_codes, axes=("mlp", "embed"), rngs=rngs)

  def __call__(self, states: jax.Array) -> jax.Array:
    return self.out(ACTIVATIONS["gelu"](self.hidden(states))).astype(jnp.float32)


class Janus(LanguageCaptioner):
  """Vision tower, language model, image tokenizer, and what connects them."""

  config: JanusConfig

  def __init__(self, config: JanusConfig, *, rngs: nnx.Rngs):
    width, vq = config.language.width, config.vq
    self.vision = PatchTower(config.vision, rngs=rngs)
    self.vision_aligner = Aligner(config.vision.width, width, config.vision_depth, "gelu", rngs=rngs)
    self.language = LanguageModel(config.language, rngs=rngs)
    self.vq = VQ(vq, rngs=rngs)
    # Not the codebook: what the language model reads of an image token is learned separately.
    embedding = nnx.initializers.normal(vq.code_width**-0.5)(rngs.params(), (vq.num_codes, vq.code_width))
    self.image_embedding = nnx.Param(embedding, out_sharding=(None, None))
    self.image_aligner = Aligner(vq.code_width, width, config.image_depth, "gelu", rngs=rngs)
    self.image_head = ImageHead(config, rngs=rngs)
    self.config = config

  def embed_prompt(self, tokens: jax.Array, images: jax.Array) -> jax.Array:
    """Token embeddings with the image tokens filled in; one image per row.

    Args:
      tokens: int32[B, T] with `image_token_id` `config.num_image_tokens` times per row.
      images: uint8[B, P, P, 3], P = `config.vision.image_px`.

    Returns:
      float[B, T, D] in the dtype of the embedding table.
    """
    embeddings = self.language.embed(tokens)
    pixels = (images.astype(jnp.float32) / 127.5 - 1.0).astype(embeddings.dtype)
    states = self.vision_aligner(self.vision.patch_states(pixels))
    return fill_image(embeddings, tokens == self.config.image_token_id, states)

  def prompt(
    self, prompts: Prompts, images: jax.Array, questions: Questions | None = None
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Embeds the image and the question of every row, see `models.captioner.Captioner`.

    Raises:
      ValueError: the images do not have the tower's size.
    """
    side = self.config.vision.image_px
    if images.shape[1:3] != (side, side):
      raise ValueError(f"images of {images.shape[1]} x {images.shape[2]} pixels: Janus reads {side} x {side}")
    if questions is not None:
      tokens, mask = questions.tokens, questions.mask
    else:
      tokens = jnp.broadcast_to(jnp.asarray(prompts.caption), (len(images), len(prompts.caption)))
      mask = jnp.ones(tokens.shape, bool)
    return self.embed_prompt(tokens, images), text_positions(mask), mask

  def embed_image_tokens(self, tokens: jax.Array) -> jax.Array:
    """What the language model reads of image tokens: int32[...] -> float[..., D]."""
    return self.image_aligner(self.image_embedding[...][tokens])

  def image_logits(self, states: jax.Array) -> jax.Array:
    """Logits of the next image token: float[..., D] -> float32[..., num_codes]."""
    return self.image_head(states)
