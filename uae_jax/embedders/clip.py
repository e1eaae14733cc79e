"""CLIP: the image tower of transformers' CLIPModel."""

from PIL import Image

from uae_jax.data.preprocessing import OPENAI_MEAN, OPENAI_STD
from uae_jax.embedders import huggingface
from uae_jax.embedders.kind import EmbedderSizes, Kind
from uae_jax.models.clip import CLIPConfig, CLIPVision, CLIPVisionConfig
from uae_jax.weights import clip

# Source: transformers 5.23 image_processing_pil_clip.py, class attributes.
PROCESSOR = {
  "size": {"shortest_edge": 224},
  "crop_size": {"height": 224, "width": 224},
  "do_center_crop": True,
  "resample": Image.Resampling.BICUBIC,
  "image_mean": OPENAI_MEAN,
  "image_std": OPENAI_STD,
}

KIND = Kind(
  network=CLIPVision,
  config=CLIPVisionConfig,
  open=huggingface.opener(
    "clip",
    config=lambda settings: CLIPConfig.from_huggingface(settings).vision,
    table=lambda config, _: clip.vision_table(config),
    ignored=clip.IGNORED_BY_VISION,
    processors={"CLIPImageProcessor": PROCESSOR},
  ),
  published={
    "clip-vit-large-patch14": EmbedderSizes("clip", CLIPVisionConfig.clip_vit_l14(), 224, OPENAI_MEAN, OPENAI_STD)
  },
)
