"""A tiny folder of Janus as transformers writes it: random weights, a word tokenizer, the real image processor."""

from pathlib import Path

import numpy as np
import tokenizers
import torch
from transformers import (
  GenerationConfig,
  JanusConfig,
  JanusForConditionalGeneration,
  JanusImageProcessorPil,
  JanusProcessor,
  PreTrainedTokenizerFast,
)

SIDE, PATCH, GRID = 24, 4, 6
IMAGE, BEGIN_IMAGE, END_IMAGE = "<image_placeholder>", "<begin_of_image>", "<end_of_image>"
WORDS = "a red blue green small large circle square cross on black gray left of the and what color is it ? . : , User"
SPECIAL = ("<bos>", "<eos>", "<pad>", "<unk>", IMAGE, BEGIN_IMAGE, END_IMAGE, "<|User|>", "<|Assistant|>")
# As in deepseek-community/Janus-Pro-1B: the text of a message is stripped, an image has a line of its own.
TEMPLATE = (
  "{%- for message in messages %}{% if message['role'] == 'user' %}<|User|>: {% else %}<|Assistant|>: {% endif %}"
  "{%- for content in message['content'] %}{% if content['type'] == 'image' %}"
  "{% if not loop.first %}{{ '\n' }}{% endif %}<image_placeholder>{% if not loop.last %}{{ '\n' }}{% endif %}"
  "{% else %}{{ content['text'].strip() }}{% endif %}{% endfor %}{{ '\n\n' }}{% endfor %}"
  "{% if add_generation_prompt %}<|Assistant|>:{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
  """Words, and characters of everything else; every text begins with `<bos>`."""
  vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS.split()))}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
  tokenizer.add_special_tokens(list(SPECIAL))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 0)]
  )
  return PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    bos_token="<bos>",
    eos_token="<eos>",
    pad_token="<pad>",
    unk_token="<unk>",
    extra_special_tokens={"image_token": IMAGE, "boi_token": BEGIN_IMAGE, "eoi_token": END_IMAGE},
  )


def write_janus_folder(folder: Path) -> tuple[JanusForConditionalGeneration, JanusProcessor]:
  """Writes model and processor to a folder; returns both."""
  torch.set_num_threads(1)
  torch.manual_seed(0)
  tokenizer = make_tokenizer()
  images = JanusImageProcessorPil(
    size={"height": SIDE, "width": SIDE}, min_size=3, image_mean=[0.5] * 3, image_std=[0.5] * 3
  )
  processor = JanusProcessor(images, tokenizer, chat_template=TEMPLATE, num_image_tokens=GRID**2)
  config = JanusConfig(
    text_config={
      "model_type": "llama",
      "vocab_size": 48,
      "hidden_size": 48,
      "intermediate_size": 40,
      "num_hidden_layers": 2,
      "num_attention_heads": 4,
      "num_key_value_heads": 2,
      "rms_norm_eps": 1e-6,
      "bos_token_id": tokenizer.bos_token_id,
      "eos_token_id": tokenizer.eos_token_id,
      "pad_token_id": tokenizer.pad_token_id,
    },
    vision_config={
      "image_size": SIDE,
      "patch_size": PATCH,
      "hidden_size": 32,
      "num_hidden_layers": 2,
      "num_attention_heads": 2,
      "mlp_ratio": 1.5,
      "projection_dim": 48,
      "num_image_tokens": GRID**2,
    },
    vq_config={
      "base_channels": 32,
      "channel_multiplier": [1, 1, 2],
      "num_res_blocks": 1,
      "latent_channels": 12,
      "num_embeddings": 50,
      "embed_dim": 8,
      "num_patches": GRID,
      "projection_dim": 48,
      "image_token_embed_dim": 48,
    },
    image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
    tie_word_embeddings=False,
  )
  model = JanusForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      noise = torch.randn_like(parameter)
      is_norm = "norm" in name and name.endswith("weight")
      fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
      parameter.copy_(1 + 0.3 * noise if is_norm else noise / fan_in**0.5)
  model.generation_config = GenerationConfig(
    do_sample=False, bos_token_id=0, eos_token_id=1, pad_token_id=2, generation_kwargs={"boi_token_id": 5}
  )
  model.save_pretrained(folder)
  processor.save_pretrained(folder)
  return model, processor


def pictures() -> list[np.ndarray]:
  """Three images uint8[H, W, 3]: wide, tall and square."""
  rng = np.random.default_rng(0)
  return [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((20, 50), (90, 31), (24, 24))]
