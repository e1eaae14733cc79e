"""A tiny folder in the official layout with adapters, written by our own export: no torch, nothing compiled."""

import json
from pathlib import Path

from flax import nnx
import jax
import numpy as np

from uae_jax import sharding
from uae_jax.data.processing import Processor
from uae_jax.layers.lora import LoRA
from uae_jax.models.connector import ConnectorConfig
from uae_jax.models.language import LanguageConfig
from uae_jax.models.mmdit import MMDiTConfig
from uae_jax.models.qwen25_vl.model import Qwen25VLConfig
from uae_jax.models.qwen25_vl.vision import VisionConfig
from uae_jax.models.uae import UAE, UAEConfig
from uae_jax.models.vae import AutoencoderKLConfig
from uae_jax.small_world.processor import write_processor
from uae_jax.weights import export
from uae_jax.weights.checkpoint import InferenceSettings, LoadedUAE

RANK, ALPHA = 2, 6


def write_official_folder(folder: Path) -> Path:
  """Writes random weights in the official layout, with adapters of rank 2 and alpha 6."""
  processor_folder = folder.with_name(f"{folder.name}_processor")
  write_processor(processor_folder)
  processor = Processor.from_folder(processor_folder)
  config = UAEConfig(
    captioner=Qwen25VLConfig(
      vision=VisionConfig(depth=1, width=8, num_heads=1, mlp_width=8, out_width=16, patch_size=4, window_px=16),
      language=LanguageConfig(
        vocab_size=8 * (processor.vocab_size // 8 + 1),
        width=16,
        depth=2,
        num_heads=2,
        num_kv_heads=1,
        head_width=8,
        mlp_width=16,
        mrope_sections=(1, 1, 2),
        ties_embeddings=True,
      ),
      image_token_id=processor.image_token_id,
    ),
    connector=ConnectorConfig(16, 16, 16),
    decoder=MMDiTConfig(
      depth=3,
      num_heads=1,
      head_width=8,
      patch=2,
      context_width=16,
      pooled_width=8,
      pos_embed_max_size=4,
      sample_size=4,
      dual_attention_layers=(0,),
    ),
    vae=AutoencoderKLConfig(block_channels=(4, 4), layers_per_block=1, norm_groups=2),
    captioner_lora=LoRA(RANK, ALPHA, "^language/layers/attention/(query|value)$"),
    decoder_lora=LoRA(RANK, ALPHA, "(projections/(query|key|value)|mlp_in)$"),
  )
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  graphdef, abstract = sharding.abstract_model(lambda: UAE(config, rngs=nnx.Rngs(0)), mesh)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), abstract)
  params["vae"] |= {"latent_scaling": np.full(16, 1.5, np.float32), "latent_shift": np.full(16, 0.5, np.float32)}
  loaded = LoadedUAE(config, graphdef, params, processor, processor_folder, InferenceSettings())
  export.write_uae(folder, loaded, merged=False)
  return folder


def change_json(file: Path, **changes) -> None:
  """Sets fields of a JSON file; a field of None is removed."""
  settings = (json.loads(file.read_text()) if file.exists() else {}) | changes
  file.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))
