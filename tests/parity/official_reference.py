"""A tiny folder in the official layout of UAE, written by torch and the Hugging Face libraries, and its models."""

import dataclasses
import json
from pathlib import Path

from diffusers import AutoencoderKL, SD3Transformer2DModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
import torch
from transformers import (
  CLIPTextConfig,
  CLIPTextModelWithProjection,
  Qwen2_5_VLConfig,
  Qwen2_5_VLForConditionalGeneration,
)

from uae_jax.data.processing import Processor
from uae_jax.small_world.processor import write_processor

WIDTH, CONTEXT, RANK = 32, 48, 4
POOLED = (12, 20)
QWEN_FOLDER, DIT_FOLDER, VAE_FOLDER = "llm_model", "dit", "SD3/vae"


@dataclasses.dataclass
class Reference:
  """The folder and its PyTorch models. The language model and the decoder have their adapters enabled."""

  folder: Path
  processor: Processor
  language: Qwen2_5_VLForConditionalGeneration
  projector: torch.nn.Sequential
  decoder: torch.nn.Module
  vae: AutoencoderKL
  text_encoders: list[CLIPTextModelWithProjection]

  def context(self, prompts: list[str]) -> torch.Tensor:
    """The connector's outputs at every slot of prompts padded together; padding has position 1."""
    ids, mask = self.processor.pad_rows([self.processor.generation_prompt(prompt) for prompt in prompts])
    ids, mask = torch.as_tensor(ids).long(), torch.as_tensor(mask).long()
    positions = torch.where(mask.bool(), torch.arange(ids.shape[1]), 1).expand(3, *ids.shape)
    out = self.language(ids, attention_mask=mask, position_ids=positions, output_hidden_states=True, use_cache=False)
    return self.projector(out.hidden_states[-1])

  def velocity(self, latents, timesteps, context, pooled) -> torch.Tensor:
    return self.decoder(
      hidden_states=latents, timestep=timesteps, encoder_hidden_states=context, pooled_projections=pooled
    ).sample


def randomize(module: torch.nn.Module, seed: int) -> torch.nn.Module:
  """Draws weights of order 1 / sqrt(fan_in), and norms and biases that are not ones and zeros."""
  generator = torch.Generator().manual_seed(seed)
  for parameter in module.parameters():
    fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
    noise = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
    parameter.data.copy_(noise if parameter.ndim > 1 else noise + parameter.data)
  return module.eval().requires_grad_(False)


def randomize_adapters(module: torch.nn.Module, seed: int) -> None:
  generator = torch.Generator().manual_seed(seed)
  for name, parameter in module.named_parameters():
    if "lora_" in name:
      parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def save(tensors: dict[str, torch.Tensor], folder: Path, stem: str, shards: int = 1) -> None:
  """Saves tensors as one file, or as shards with an index."""
  folder.mkdir(parents=True, exist_ok=True)
  tensors = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
  if shards == 1:
    save_file(tensors, folder / f"{stem}.safetensors", {"format": "pt"})
    return
  places = {}
  for i in range(shards):
    file = f"{stem}-{i + 1:05d}-of-{shards:05d}.safetensors"
    part = {name: tensors[name] for name in list(tensors)[i::shards]}
    save_file(part, folder / file, {"format": "pt"})
    places |= dict.fromkeys(part, file)
  (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def old_name(name: str) -> str:
  """A tensor's name in transformers 4.50."""
  return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def qwen_config(vocab_size: int, image_token: int, end: int, pad: int) -> dict:
  return {
    "model_type": "qwen2_5_vl",
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "vocab_size": vocab_size,
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [1, 1, 2]},
    "tie_word_embeddings": True,
    "image_token_id": image_token,
    "eos_token_id": end,
    "bos_token_id": pad,
    "pad_token_id": pad,
    "vision_config": {
      "model_type": "qwen2_5_vl",
      "depth": 2,
      "hidden_size": 16,
      "intermediate_size": 20,
      "num_heads": 2,
      "out_hidden_size": WIDTH,
      "patch_size": 4,
      "spatial_patch_size": 4,
      "window_size": 16,
      "fullatt_block_indexes": [1],
      "hidden_act": "silu",
    },
  }


def write_clip_encoder(root: Path, number: int, width: int, activation: str) -> CLIPTextModelWithProjection:
  """Writes a text encoder of SD3 with a tokenizer of letters."""
  suffix = "" if number == 1 else f"_{number}"
  letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
  vocabulary = ["!", *letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
  tokenizer = root / f"tokenizer{suffix}"
  tokenizer.mkdir(parents=True)
  (tokenizer / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
  (tokenizer / "merges.txt").write_text("#version: 0.2\n")
  special = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>" if number == 1 else "!",
  }
  (tokenizer / "tokenizer_config.json").write_text(
    json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special})
  )
  config = CLIPTextConfig(
    vocab_size=len(vocabulary),
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    projection_dim=width,
    hidden_act=activation,
    # The published files have 2 here, which means pooling at the largest id.
    eos_token_id=2 if number == 1 else len(vocabulary) - 1,
  )
  model = randomize(CLIPTextModelWithProjection(config), number)
  folder = root / f"text_encoder{suffix}"
  save(model.state_dict(), folder, "model")
  (folder / "config.json").write_text(json.dumps(config.to_dict()))
  return model


def write_official_folder(folder: Path) -> Reference:
  """Writes everything that the official folder contains; PEFT writes the adapters' files."""
  torch.set_num_threads(1)
  write_processor(folder / QWEN_FOLDER)
  processor = Processor.from_folder(folder / QWEN_FOLDER)
  # Larger than the tokenizer, like the published vocabulary.
  vocab_size = 8 * (processor.vocab_size // 8 + 1)
  plain = qwen_config(vocab_size, processor.image_token_id, processor.end_ids[0], processor.pad_id)
  (folder / QWEN_FOLDER / "config.json").write_text(json.dumps(plain))
  language = randomize(Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**plain)), 0)
  projector = torch.nn.Sequential(torch.nn.Linear(WIDTH, 56), torch.nn.GELU(), torch.nn.Linear(56, CONTEXT))
  randomize(projector, 1)
  connector = {f"projector.{name}": value for name, value in projector.state_dict().items()}
  base = {old_name(name): value for name, value in language.state_dict().items() if name != "lm_head.weight"}
  save(base | connector, folder / QWEN_FOLDER, "model", shards=2)

  # The full state after training: different base weights, a trained connector, adapters.
  for parameter in (projector[2].weight, language.model.visual.merger.mlp[2].bias):
    parameter.data.mul_(1.1)
  adapters = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
  wrapped = get_peft_model(language.model.language_model, adapters)
  randomize_adapters(wrapped, 2)
  full = {f"model.{name}": value for name, value in wrapped.state_dict().items()}
  full |= {f"visual.{name}": value for name, value in language.model.visual.state_dict().items()}
  full |= {f"projector.{name}": value for name, value in projector.state_dict().items()}
  save(full, folder / "llm_lora", "model", shards=3)

  decoder = SD3Transformer2DModel(
    sample_size=8,
    patch_size=2,
    in_channels=16,
    out_channels=16,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=CONTEXT,
    caption_projection_dim=16,
    pooled_projection_dim=sum(POOLED),
    pos_embed_max_size=6,
    dual_attention_layers=(0,),
    qk_norm="rms_norm",
  )
  randomize(decoder, 3).save_pretrained(folder / DIT_FOLDER)
  targets = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "norm1.linear"]
  decoder = get_peft_model(decoder, LoraConfig(r=RANK, lora_alpha=3 * RANK, target_modules=targets))
  randomize_adapters(decoder, 4)
  decoder.eval().save_pretrained(folder / "dit_lora")

  vae = AutoencoderKL(
    block_out_channels=(8, 8),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    layers_per_block=1,
    latent_channels=16,
    norm_num_groups=4,
    scaling_factor=1.5305,
    shift_factor=0.0609,
    use_quant_conv=False,
    use_post_quant_conv=False,
  )
  randomize(vae, 5).save_pretrained(folder / VAE_FOLDER)
  text_encoders = [
    write_clip_encoder(folder / "SD3", number, width, activation)
    for number, width, activation in zip((1, 2), POOLED, ("quick_gelu", "gelu"), strict=True)
  ]
  return Reference(folder, processor, language.eval(), projector, decoder, vae, text_encoders)
