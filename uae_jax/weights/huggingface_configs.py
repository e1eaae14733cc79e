"""Contents of `config.json` for transformers and diffusers: the inverses of our `from_huggingface`."""

from typing import Any

from uae_jax.layers.lora import LoRA
from uae_jax.models.janus.model import JanusConfig
from uae_jax.models.mmdit import MMDiTConfig
from uae_jax.models.qwen25_vl.model import Qwen25VLConfig
from uae_jax.models.vae import AutoencoderKLConfig


def qwen25_vl(config: Qwen25VLConfig, dtype: str) -> dict[str, Any]:
  """Content of `config.json` for Qwen2.5-VL, flat as in transformers 4.50; newer versions read it too.

  Raises:
    ValueError: transformers cannot express the config.
  """
  language, vision = config.language, config.vision
  if language.head_width * language.num_heads != language.width:
    raise ValueError(
      f"head_width {language.head_width} x num_heads {language.num_heads} is not the width {language.width}, "
      "which transformers derives the heads from"
    )
  return {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "hidden_act": "silu",
    "hidden_size": language.width,
    "image_token_id": config.image_token_id,
    "intermediate_size": language.mlp_width,
    "num_attention_heads": language.num_heads,
    "num_hidden_layers": language.depth,
    "num_key_value_heads": language.num_kv_heads,
    "rms_norm_eps": language.norm_eps,
    "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": list(language.mrope_sections)},
    "rope_theta": language.rope_theta,
    "tie_word_embeddings": language.ties_embeddings,
    "torch_dtype": dtype,
    "use_sliding_window": False,
    "vision_config": {
      "model_type": "qwen2_5_vl",
      "depth": vision.depth,
      "fullatt_block_indexes": list(vision.full_attention_layers),
      "hidden_act": "silu",
      "hidden_size": vision.width,
      "in_channels": vision.in_channels,
      "in_chans": vision.in_channels,
      "intermediate_size": vision.mlp_width,
      "num_heads": vision.num_heads,
      "out_hidden_size": vision.out_width,
      "patch_size": vision.patch_size,
      "spatial_merge_size": vision.spatial_merge,
      "spatial_patch_size": vision.patch_size,
      "temporal_patch_size": vision.temporal_patch,
      "window_size": vision.window_px,
    },
    "vocab_size": language.vocab_size,
  }


def janus(config: JanusConfig, dtype: str) -> dict[str, Any]:
  """Content of `config.json` for transformers' JanusForConditionalGeneration."""
  language, vision, vq = config.language, config.vision, config.vq
  widths = {"projection_dim": language.width}
  return {
    "architectures": ["JanusForConditionalGeneration"],
    "model_type": "janus",
    "image_token_id": config.image_token_id,
    "tie_word_embeddings": language.ties_embeddings,
    "dtype": dtype,
    "text_config": {
      "model_type": "llama",
      "vocab_size": language.vocab_size,
      "hidden_size": language.width,
      "intermediate_size": language.mlp_width,
      "num_hidden_layers": language.depth,
      "num_attention_heads": language.num_heads,
      "num_key_value_heads": language.num_kv_heads,
      "head_dim": language.head_width,
      "rms_norm_eps": language.norm_eps,
      "rope_parameters": {"rope_type": "default", "rope_theta": language.rope_theta},
    },
    "vision_config": widths
    | {
      "model_type": "janus_vision_model",
      "image_size": vision.image_px,
      "patch_size": vision.patch,
      "hidden_size": vision.width,
      "num_hidden_layers": vision.depth,
      "num_attention_heads": vision.num_heads,
      "mlp_ratio": vision.mlp_width / vision.width,
      "hidden_act": vision.activation,
      "layer_norm_eps": vision.norm_eps,
      "attention_bias": vision.query_bias,
      "depth": config.vision_depth,
      "num_image_tokens": config.num_image_tokens,
    },
    "vq_config": widths
    | {
      "model_type": "janus_vqgan",
      "base_channels": vq.block_channels[0],
      "channel_multiplier": [channels // vq.block_channels[0] for channels in vq.block_channels],
      "num_res_blocks": vq.layers_per_block,
      "latent_channels": vq.latent_channels,
      "num_embeddings": vq.num_codes,
      "embed_dim": vq.code_width,
      "num_patches": vision.grid,
      "num_hidden_layers": config.image_depth,
      "image_token_embed_dim": language.width,
    },
  }


def mmdit(config: MMDiTConfig) -> dict[str, Any]:
  return {
    "_class_name": "SD3Transformer2DModel",
    "attention_head_dim": config.head_width,
    "caption_projection_dim": config.width,
    "dual_attention_layers": list(config.dual_attention_layers),
    "in_channels": config.in_channels,
    "joint_attention_dim": config.context_width,
    "num_attention_heads": config.num_heads,
    "num_layers": config.depth,
    "out_channels": config.in_channels,
    "patch_size": config.patch,
    "pooled_projection_dim": config.pooled_width,
    "pos_embed_max_size": config.pos_embed_max_size,
    "qk_norm": "rms_norm" if config.qk_norm else None,
    "sample_size": config.sample_size,
  }


def autoencoder_kl(config: AutoencoderKLConfig, scaling: float, shift: float) -> dict[str, Any]:
  levels = len(config.block_channels)
  return {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": list(config.block_channels),
    "down_block_types": ["DownEncoderBlock2D"] * levels,
    "force_upcast": True,
    "in_channels": config.image_channels,
    "latent_channels": config.latent_channels,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": config.layers_per_block,
    "mid_block_add_attention": config.mid_attention,
    "norm_num_groups": config.norm_groups,
    "out_channels": config.image_channels,
    "scaling_factor": scaling,
    "shift_factor": shift,
    "up_block_types": ["UpDecoderBlock2D"] * levels,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
  }


def adapter(lora: LoRA, target_modules: str) -> dict[str, Any]:
  """Content of PEFT's `adapter_config.json`.

  Args:
    lora: gives rank and alpha.
    target_modules: regular expression that matches complete module names.
  """
  alpha = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
  return {
    "base_model_name_or_path": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_alpha": alpha,
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": lora.rank,
    "target_modules": target_modules,
    "task_type": None,
    "use_dora": False,
    "use_rslora": False,
  }
