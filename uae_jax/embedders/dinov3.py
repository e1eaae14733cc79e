"""DINOv3: the class token of transformers' DINOv3ViTModel."""

from PIL import Image

from uae_jax.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from uae_jax.embedders import huggingface
from uae_jax.embedders.kind import EmbedderSizes, Kind
from uae_jax.models.dinov3 import DINOv3, DINOv3Config
from uae_jax.weights import dinov3

# Source: transformers 5.23 image_processing_dinov3_vit.py, class attributes; it rescales before it resizes.
PROCESSOR = {
  "size": {"height": 224, "width": 224},
  "crop_size": {"height": 224, "width": 224},
  "do_center_crop": False,
  "default_to_square": True,
  "resizes_floats": True,
  "resample": Image.Resampling.BILINEAR,
  "image_mean": IMAGENET_MEAN,
  "image_std": IMAGENET_STD,
}

KIND = Kind(
  network=DINOv3,
  config=DINOv3Config,
  open=huggingface.opener(
    "dinov3",
    model_types=("dinov3_vit",),
    config=DINOv3Config.from_huggingface,
    table=lambda config, names: dinov3.table(config, v5=dinov3.is_v5(names)),
    ignored=dinov3.IGNORED,
    processors={"DINOv3ViTImageProcessor": PROCESSOR},
  ),
  published={
    "dinov3-vitl16-pretrain-lvd1689m": EmbedderSizes(
      "dinov3", DINOv3Config.dinov3_vitl16(), 224, IMAGENET_MEAN, IMAGENET_STD
    )
  },
)
