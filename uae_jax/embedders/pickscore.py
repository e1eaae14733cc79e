"""PickScore: a CLIP ViT-H/14 trained on preferences between images, in the layout of transformers' CLIPModel.

Source: Kirstain et al. 2023 (arXiv 2305.01569); yuvalkirstain/PickScore_v1. The score is the cosine times
exp(logit_scale).
"""

import dataclasses
from pathlib import Path

import numpy as np

from uae_jax.data.preprocessing import OPENAI_MEAN, OPENAI_STD
from uae_jax.embedders import clip
from uae_jax.embedders.kind import EmbedderSizes, Kind, TextTower
from uae_jax.models.clip import CLIPVisionConfig


def open_text(path: Path) -> TextTower:
  """Opens the text tower of a folder, with the tokenizer in it."""
  tower = clip.open_text(path)
  if "logit_scale" not in tower.tensors:
    raise ValueError(f"{path}: no logit_scale, which is a factor of PickScore")
  return dataclasses.replace(tower, score_scale=float(np.exp(np.float32(tower.tensors["logit_scale"]))))


KIND = Kind(
  network=clip.KIND.network,
  config=CLIPVisionConfig,
  open=clip.opener("pickscore"),
  published={"PickScore_v1": EmbedderSizes("pickscore", CLIPVisionConfig.clip_vit_h14(), 224, OPENAI_MEAN, OPENAI_STD)},
  open_text=open_text,
)
