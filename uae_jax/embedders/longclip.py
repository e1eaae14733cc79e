"""Long-CLIP: the image tower of a checkpoint in the layout of OpenAI's CLIP, which has no config file."""

import functools
from pathlib import Path

from uae_jax.data import processor_files
from uae_jax.data.preprocessing import OPENAI_MEAN, OPENAI_STD, Preprocessing
from uae_jax.embedders.kind import Checkpoint, EmbedderSizes, Kind, TextTower
from uae_jax.models.clip import CLIPText, CLIPVision, CLIPVisionConfig
from uae_jax.weights import longclip, tensor_files

TOKENIZER_FILES = ("vocab.json", "merges.txt")


def preprocessing(image_px: int) -> Preprocessing:
  """Torchvision's Resize, CenterCrop, ToTensor, Normalize. Source: Long-CLIP, model/longclip.py `_transform`."""
  return Preprocessing(image_px, (image_px, image_px), rounds_crop=True)


def checkpoint_file(path: Path) -> Path:
  """The `.pt` or `.safetensors` file that a path names: itself, or the only one in a folder."""
  if not path.is_dir():
    return path
  files = sorted(file for file in path.iterdir() if file.suffix in (".pt", ".safetensors"))
  if len(files) != 1:
    raise ValueError(f"{path}: {len(files)} .pt or .safetensors files, expected 1 (longclip embedder)")
  return files[0]


def open_file(path: Path) -> Checkpoint:
  """Opens a `.pt` or `.safetensors` file, or a folder with one such file."""
  path = checkpoint_file(path)
  tensors = tensor_files.open_file(path)
  try:
    config = longclip.config_of(tensors).vision
  except (ValueError, ArithmeticError, KeyError, IndexError) as error:
    raise ValueError(f"{path}: not a Long-CLIP checkpoint ({error})") from error
  table = longclip.vision_table(config)
  return Checkpoint(config, tensors, table, longclip.IGNORED_BY_VISION, preprocessing(config.image_px))


def open_text(path: Path) -> TextTower:
  """Opens the text tower of a checkpoint; the tokenizer of CLIP lies beside it."""
  file = checkpoint_file(path)
  if absent := [name for name in TOKENIZER_FILES if not (file.parent / name).is_file()]:
    raise ValueError(
      f"{file.parent}: no {absent[0]}: copy {' and '.join(TOKENIZER_FILES)} of CLIP beside the checkpoint"
    )
  tensors = tensor_files.open_file(file)
  config = longclip.config_of(tensors).text
  tokenizer = functools.partial(processor_files.read_clip_tokenizer, file.parent)
  return TextTower(CLIPText, config, tensors, longclip.text_table(config), longclip.IGNORED_BY_TEXT, tokenizer)


KIND = Kind(
  network=CLIPVision,
  config=CLIPVisionConfig,
  open=open_file,
  published={"longclip-L": EmbedderSizes("longclip", CLIPVisionConfig.clip_vit_l14(), 224, OPENAI_MEAN, OPENAI_STD)},
  open_text=open_text,
)
