"""Long-CLIP: the image tower of a checkpoint in the layout of OpenAI's CLIP, which has no config file."""

from pathlib import Path

from uae_jax.data.preprocessing import OPENAI_MEAN, OPENAI_STD, Preprocessing
from uae_jax.embedders import openai_layout
from uae_jax.embedders.kind import Checkpoint, EmbedderSizes, Kind, TextTower
from uae_jax.models.clip import CLIPVision, CLIPVisionConfig
from uae_jax.weights import longclip


def preprocessing(image_px: int) -> Preprocessing:
  """Torchvision's Resize, CenterCrop, ToTensor, Normalize. Source: Long-CLIP, model/longclip.py `_transform`."""
  return Preprocessing(image_px, (image_px, image_px), rounds_crop=True)


def open_file(path: Path) -> Checkpoint:
  """Opens a `.pt` or `.safetensors` file, or a folder with one such file."""
  return openai_layout.open_image("longclip", path, longclip.config_of, preprocessing)


def open_text(path: Path) -> TextTower:
  """Opens the text tower of a checkpoint; the tokenizer of CLIP lies beside it."""
  return openai_layout.open_text("longclip", path, longclip.config_of, longclip.text_table)


KIND = Kind(
  network=CLIPVision,
  config=CLIPVisionConfig,
  open=open_file,
  published={"longclip-L": EmbedderSizes("longclip", CLIPVisionConfig.clip_vit_l14(), 224, OPENAI_MEAN, OPENAI_STD)},
  open_text=open_text,
)
