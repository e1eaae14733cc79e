"""SigLIP 2 at fixed resolution: the pooled image tower of transformers' SiglipModel."""

import functools
from pathlib import Path

from PIL import Image

from uae_jax import json_files
from uae_jax.data import processor_files
from uae_jax.embedders import huggingface
from uae_jax.embedders.kind import EmbedderSizes, Kind, TextTower
from uae_jax.models.siglip2 import SigLIP2Config, SigLIP2Text, SigLIP2Vision, SigLIP2VisionConfig
from uae_jax.weights import siglip2, tensor_files

HALF = (0.5, 0.5, 0.5)
# Source: transformers 5.23 image_processing_pil_siglip.py, class attributes: stretched to a square, never cropped.
PROCESSOR = {
  "size": {"height": 224, "width": 224},
  "do_center_crop": False,
  "resample": Image.Resampling.BICUBIC,
  "image_mean": HALF,
  "image_std": HALF,
}


def sizes(network: SigLIP2VisionConfig) -> EmbedderSizes:
  """Sizes of an embedder whose input has the size that the model was trained with."""
  return EmbedderSizes("siglip2", network, network.image_px, HALF, HALF)


def open_text(path: Path) -> TextTower:
  """Opens the text tower of a folder, with the tokenizer in it."""
  config = SigLIP2Config.from_huggingface(json_files.read_object(path / "config.json")).text
  return TextTower(
    SigLIP2Text,
    config,
    tensor_files.open_folder(path),
    siglip2.text_table(config),
    siglip2.IGNORED_BY_TEXT,
    functools.partial(processor_files.read_tokenizer, path),
    is_lower_case=True,
  )


KIND = Kind(
  network=SigLIP2Vision,
  config=SigLIP2VisionConfig,
  open=huggingface.opener(
    "siglip2",
    model_types=("siglip", "siglip2"),  # the config explains what a siglip2 is
    config=lambda settings: SigLIP2Config.from_huggingface(settings).vision,
    table=lambda config, _: siglip2.vision_table(config),
    ignored=siglip2.IGNORED_BY_VISION,
    processors={"SiglipImageProcessor": PROCESSOR},
  ),
  published={
    f"siglip2-so400m-patch{patch}-{image_px}": sizes(SigLIP2VisionConfig.siglip2_so400m(image_px, patch))
    for image_px, patch in ((384, 14), (224, 14), (256, 16), (384, 16), (512, 16))
  }
  | {
    f"siglip2-base-patch16-{image_px}": sizes(SigLIP2VisionConfig.siglip2_base(image_px))
    for image_px in (224, 256, 384, 512)
  },
  open_text=open_text,
)
