"""CLIP: the image tower of transformers' CLIPModel."""

from collections.abc import Callable
import functools
from pathlib import Path

from PIL import Image

from uae_jax import json_files
from uae_jax.data import processor_files
from uae_jax.data.preprocessing import OPENAI_MEAN, OPENAI_STD
from uae_jax.embedders import huggingface
from uae_jax.embedders.kind import Checkpoint, EmbedderSizes, Kind, TextTower
from uae_jax.models.clip import CLIPConfig, CLIPText, CLIPVision, CLIPVisionConfig
from uae_jax.weights import clip, tensor_files

# Source: transformers 5.23 image_processing_pil_clip.py, class attributes.
PROCESSOR = {
  "size": {"shortest_edge": 224},
  "crop_size": {"height": 224, "width": 224},
  "do_center_crop": True,
  "resample": Image.Resampling.BICUBIC,
  "image_mean": OPENAI_MEAN,
  "image_std": OPENAI_STD,
}


def open_text(path: Path) -> TextTower:
  """Opens the text tower of a folder, with the tokenizer in it."""
  config = CLIPConfig.from_huggingface(json_files.read_object(path / "config.json")).text
  tokenizer = functools.partial(processor_files.read_clip_tokenizer, path)
  tensors = tensor_files.open_folder(path)
  return TextTower(CLIPText, config, tensors, clip.text_table(config), clip.IGNORED_BY_TEXT, tokenizer)


def opener(kind: str) -> Callable[[Path], Checkpoint]:
  """Makes a function that opens folders of CLIPModel as an embedder of a kind."""
  return huggingface.opener(
    kind,
    model_types=("clip", "clip_vision_model"),
    config=lambda settings: CLIPConfig.from_huggingface(settings).vision,
    table=lambda config, _: clip.vision_table(config),
    ignored=clip.IGNORED_BY_VISION,
    processors={"CLIPImageProcessor": PROCESSOR},
  )


KIND = Kind(
  network=CLIPVision,
  config=CLIPVisionConfig,
  open=opener("clip"),
  published={
    "clip-vit-large-patch14": EmbedderSizes("clip", CLIPVisionConfig.clip_vit_l14(), 224, OPENAI_MEAN, OPENAI_STD)
  },
  open_text=open_text,
)
