"""A Hugging Face processor for the small world, built from its grammar and read by the same code as Qwen2.5-VL's.

Every word is one token. Special tokens and file names are those of Qwen; the chat template has the same roles and is
minimal:

  <|im_start|> user describe <|vision_start|> <|image_pad|> <|vision_end|> <|im_end|> assistant CAPTION <|im_end|>
  <|im_start|> generate CAPTION <|im_end|>
"""

import dataclasses
import json
from pathlib import Path

import numpy as np

from uae_jax.small_world import paraphrases, phrases, scenes

PAD = "<|endoftext|>"
END = "<|im_end|>"
UNKNOWN = "<|unknown|>"
# UNKNOWN comes second so that the closing token does not get id 2, which in CLIP configs means "pool at the largest
# id".
SPECIAL = (PAD, UNKNOWN, "<|im_start|>", END, "<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
ROLES = ("user", "assistant", "generate")
QUESTION = "describe"

# The small world has a single question, which replaces any text next to an image.
CHAT_TEMPLATE = (
  "{%- for message in messages -%}"
  "{{ '<|im_start|> ' + message['role'] + ' ' }}"
  "{%- if message['content'] is string -%}"
  "{{ message['content'] + ' ' if message['role'] == 'generate' else '" + QUESTION + " ' }}"
  "{%- else -%}"
  "{%- for item in message['content'] -%}"
  "{%- if item['type'] == 'text' -%}"
  "{{ item['text'] + ' ' if message['role'] == 'generate' else '" + QUESTION + " ' }}"
  "{%- else -%}{{ '<|vision_start|> <|image_pad|> <|vision_end|> ' }}{%- endif -%}"
  "{%- endfor -%}"
  "{%- endif -%}"
  "{{ '<|im_end|>' }}"
  "{%- if add_generation_prompt and loop.last and message['role'] == 'user' -%}{{ ' assistant' }}{%- endif -%}"
  "{%- endfor -%}"
)


@dataclasses.dataclass(frozen=True)
class ProcessorConfig:
  """Image sizes, which must match the vision tower.

  Attributes:
    image_px: side of an image, in pixels.
    patch_px: side of a patch, in pixels.
    merge_size: side, in patches, of the cell that becomes one token.
    words: words of the captions.
  """

  image_px: int = scenes.IMAGE_PX
  patch_px: int = 4
  merge_size: int = 2
  words: tuple[str, ...] = phrases.WORDS


RICH = ProcessorConfig(image_px=scenes.variant("rich").image_px, words=paraphrases.WORDS)


def make_tokenizer(grammar: tuple[str, ...] = phrases.WORDS):
  """Makes a `PreTrainedTokenizerFast` for special tokens, roles and the words of a grammar."""
  from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
  from transformers import PreTrainedTokenizerFast

  words = (*SPECIAL, *ROLES, QUESTION, *grammar)
  tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
  # Split only at white space: places such as top-left are one word.
  tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
  return PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    pad_token=PAD,
    eos_token=END,
    unk_token=UNKNOWN,
    padding_side="right",
    clean_up_tokenization_spaces=False,
    chat_template=CHAT_TEMPLATE,
  )


def write_processor(folder: str | Path, config: ProcessorConfig | None = None) -> None:
  """Writes a processor's files (tokenizer with chat template, image processor, generation config) to a folder."""
  config = config or ProcessorConfig()
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  tokenizer = make_tokenizer(config.words)
  tokenizer.save_pretrained(folder)
  # In one file, as in Qwen2.5-VL; newer versions of transformers write the template to a separate file.
  (folder / "chat_template.jinja").unlink(missing_ok=True)
  path = folder / "tokenizer_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": CHAT_TEMPLATE}, indent=2))
  area = config.image_px**2
  image = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "patch_size": config.patch_px,
    "temporal_patch_size": 2,
    "merge_size": config.merge_size,
    "min_pixels": area,
    "max_pixels": area,
    "size": {"shortest_edge": area, "longest_edge": area},
  }
  (folder / "preprocessor_config.json").write_text(json.dumps(image, indent=2))
  pad, end = tokenizer.convert_tokens_to_ids([PAD, END])
  generation = {
    "bos_token_id": pad,
    "pad_token_id": pad,
    "eos_token_id": [end, pad],
    "do_sample": True,
    "temperature": 1.0,
  }
  (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))


def word_ids(tokenizer) -> np.ndarray | None:
  """Token ids int32[words] of `phrases.WORDS`; None unless every word is a single, distinct token.

  Looking up this table is a hundred times faster than the tokenizer.
  """
  ids = tokenizer.encode(" ".join(phrases.WORDS), add_special_tokens=False)
  if len(ids) != len(phrases.WORDS) or len(set(ids)) != len(ids):
    return None
  return np.asarray(ids, np.int32)
