"""HPS v2 and v2.1: a CLIP ViT-H/14 trained on preferences between images, one file in the layout of open_clip.

Source: Wu et al. 2023 (arXiv 2306.09341), hpsv2/img_score.py. The score is the cosine, without exp(logit_scale).
"""

from pathlib import Path

from uae_jax.data.preprocessing import OPENAI_MEAN, OPENAI_STD, Preprocessing
from uae_jax.embedders import openai_layout
from uae_jax.embedders.kind import Checkpoint, EmbedderSizes, Kind, TextTower
from uae_jax.models.clip import CLIPVision, CLIPVisionConfig
from uae_jax.weights import open_clip


def preprocessing(image_px: int) -> Preprocessing:
  """The longest side resized and the rest padded with black. Source: open_clip, transform.py `ResizeMaxSize`."""
  return Preprocessing(image_px, (image_px, image_px), resizes_longest=True)


def open_file(path: Path) -> Checkpoint:
  """Opens a `.pt` or `.safetensors` file, or a folder with one such file."""
  return openai_layout.open_image("hpsv2", path, open_clip.config_of, preprocessing)


def open_text(path: Path) -> TextTower:
  """Opens the text tower of a checkpoint; the tokenizer of CLIP lies beside it."""
  return openai_layout.open_text("hpsv2", path, open_clip.config_of, open_clip.text_table)


KIND = Kind(
  network=CLIPVision,
  config=CLIPVisionConfig,
  open=open_file,
  published={
    "HPS_v2.1_compressed": EmbedderSizes("hpsv2", CLIPVisionConfig.clip_vit_h14(), 224, OPENAI_MEAN, OPENAI_STD)
  },
  open_text=open_text,
)
