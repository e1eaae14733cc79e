"""DINOv2: the class token of transformers' Dinov2Model or Dinov2WithRegistersModel."""

import functools

from PIL import Image

from uae_jax.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, OPENAI_MEAN, OPENAI_STD
from uae_jax.embedders import huggingface
from uae_jax.embedders.kind import EmbedderSizes, Kind
from uae_jax.models.dinov2 import DINOv2, DINOv2Config
from uae_jax.weights import dinov2

# Source: transformers 5.23 image_processing_pil_bit.py, class attributes; published files have ImageNet's statistics.
PROCESSOR = {
  "size": {"shortest_edge": 224},
  "crop_size": {"height": 224, "width": 224},
  "do_center_crop": True,
  "resample": Image.Resampling.BICUBIC,
  "image_mean": OPENAI_MEAN,
  "image_std": OPENAI_STD,
}
# The stored position table is for 518 px; as an embedder the model sees 224 px.
sizes = functools.partial(EmbedderSizes, "dinov2", image_px=224, mean=IMAGENET_MEAN, std=IMAGENET_STD)

KIND = Kind(
  network=DINOv2,
  config=DINOv2Config,
  open=huggingface.opener(
    "dinov2",
    model_types=("dinov2", "dinov2_with_registers"),
    config=DINOv2Config.from_huggingface,
    table=lambda config, names: dinov2.table(config, v5=dinov2.is_v5(names)),
    ignored=dinov2.IGNORED,
    processors={"BitImageProcessor": PROCESSOR},
  ),
  published={
    "dinov2-large": sizes(DINOv2Config.dinov2_large()),
    "dinov2-with-registers-large": sizes(DINOv2Config.dinov2_large_registers()),
  },
)
