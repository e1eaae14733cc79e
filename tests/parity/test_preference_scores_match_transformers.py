"""PickScore and HPS v2 equal transformers' CLIPModel: PickScore from its folder, HPS v2 from open_clip's one file."""

import json

from encoder_reference import abstract, assert_round_trip, assert_same_layout, randomize
from flax import nnx
import numpy as np
from PIL import Image
import pytest
from safetensors.torch import save_file
from test_text_towers_match_transformers import MAX_TOKENS, write_clip_tokenizer
import torch
from transformers import CLIPConfig, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.modeling_clip import CLIPModel

from uae_jax import embedders
from uae_jax.embedders import hpsv2, text
from uae_jax.models import clip
from uae_jax.rewards.image_text import ImageTextReward
from uae_jax.weights import open_clip as weights

CAPTIONS = [["a cab", "fed"], ["dad", "a cab"]]
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 2, 24, 24, 3), dtype=np.uint8)
# transformers -> open_clip, applied in this order.
RENAMED = {
  "vision_model.embeddings.patch_embedding": "visual.conv1",
  "vision_model.embeddings.class_embedding": "visual.class_embedding",
  "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
  "vision_model.pre_layrnorm": "visual.ln_pre",
  "vision_model.post_layernorm": "visual.ln_post",
  "vision_model.encoder.layers": "visual.transformer.resblocks",
  "text_model.embeddings.token_embedding": "token_embedding",
  "text_model.embeddings.position_embedding.weight": "positional_embedding",
  "text_model.encoder.layers": "transformer.resblocks",
  "text_model.final_layer_norm": "ln_final",
  "layer_norm1": "ln_1",
  "layer_norm2": "ln_2",
  "mlp.fc1": "mlp.c_fc",
  "mlp.fc2": "mlp.c_proj",
  "self_attn.out_proj": "attn.out_proj",
}


def write_tokenizer(folder) -> CLIPTokenizer:
  folder.mkdir(exist_ok=True)
  return write_clip_tokenizer(folder)


def make_model(vocabulary: int) -> CLIPModel:
  """Like ViT-H-14: 16 heads in both towers, exact GELU, four times as wide in between."""
  shared = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 16, "hidden_act": "gelu"}
  vision = shared | {"image_size": 24, "patch_size": 8, "num_hidden_layers": 1}
  words = {"vocab_size": vocabulary, "max_position_embeddings": MAX_TOKENS, "eos_token_id": 2, "num_hidden_layers": 2}
  return randomize(CLIPModel(CLIPConfig(vision_config=vision, text_config=shared | words, projection_dim=12)))


def to_open_clip(model: CLIPModel) -> dict[str, torch.Tensor]:
  """The published names of open_clip: query, key and value packed, projections as [in, out]."""
  tensors = {name: value for name, value in model.state_dict().items() if not name.endswith("position_ids")}
  out = {"visual.proj": tensors.pop("visual_projection.weight").T, "logit_scale": tensors.pop("logit_scale")}
  out["text_projection"] = tensors.pop("text_projection.weight").T
  for name in [name for name in tensors if ".q_proj." in name]:
    parts = [tensors.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
    tensors[name.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat(parts)
  for name, value in tensors.items():
    for theirs, ours in RENAMED.items():
      name = name.replace(theirs, ours)
    out[name] = value
  return {name: value.contiguous().clone() for name, value in out.items()}


def expected(model: CLIPModel, tokenizer) -> tuple[np.ndarray, float]:
  """(cosines float32[prompts, rollouts], exp(logit_scale)) of the library."""
  processor = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
  rows = []
  for group, images in zip(CAPTIONS, IMAGES, strict=True):
    tokens = tokenizer(group, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    pixels = processor(images=list(images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
      found = model(pixel_values=pixels, input_ids=tokens["input_ids"])
    rows.append(torch.sum(found.image_embeds * found.text_embeds, dim=-1).numpy())
  return np.stack(rows), model.logit_scale.exp().item()


def test_pickscore_is_the_scaled_cosine_of_the_library(tmp_path):
  tokenizer = write_tokenizer(tmp_path)
  model = make_model(len(tokenizer))
  model.save_pretrained(tmp_path)
  CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}).save_pretrained(tmp_path)
  rewards = ImageTextReward(lambda: text.load("pickscore", tmp_path))(CAPTIONS, IMAGES)
  cosines, scale = expected(model, tokenizer)
  assert abs(scale - 1) > 1e-3
  np.testing.assert_allclose(rewards, cosines * scale, atol=2e-5 * max(scale, 1))


@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_hpsv2_is_the_cosine_of_the_library(tmp_path, form):
  tokenizer = write_tokenizer(tmp_path)
  model = make_model(len(tokenizer))
  tensors = to_open_clip(model)
  if form == "pt":
    torch.save({"epoch": 3, "name": "hps", "loss": 0.5, "state_dict": tensors}, tmp_path / "HPS_v2.1_compressed.pt")
  else:
    save_file(tensors, tmp_path / "hps.safetensors")
  rewards = ImageTextReward(lambda: text.load("hpsv2", tmp_path))(CAPTIONS, IMAGES)
  np.testing.assert_allclose(rewards, expected(model, tokenizer)[0], atol=2e-5)


def test_open_clip_round_trip():
  tensors = {name: value.numpy() for name, value in to_open_clip(make_model(56)).items()}
  config = weights.config_of(tensors)
  _, shapes = abstract(lambda: clip.CLIP(config, rngs=nnx.Rngs(0)))
  assert_round_trip(tensors, weights.table(config), shapes)


def test_published_vit_h14():
  """The sizes of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, which PickScore and HPS v2 start from."""
  heads = {"num_attention_heads": 16, "hidden_act": "gelu"}
  vision = heads | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "patch_size": 14}
  words = heads | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "eos_token_id": 2}
  settings = CLIPConfig(vision_config=vision, text_config=words, projection_dim=1024)
  config = clip.CLIPConfig.clip_vit_h14()
  assert clip.CLIPConfig.from_huggingface(json.loads(settings.to_json_string(use_diff=False))) == config
  with torch.device("meta"):
    tensors = to_open_clip(CLIPModel(settings))
  views = {name: np.broadcast_to(np.float32(0), tuple(value.shape)) for name, value in tensors.items()}
  assert weights.config_of(views) == config
  _, shapes = abstract(lambda: clip.CLIP(config, rngs=nnx.Rngs(0)))
  assert_same_layout(views, weights.table(config), shapes)


@pytest.mark.parametrize("size", [(40, 24), (23, 50), (24, 24), (7, 9)], ids=str)
def test_hpsv2_preprocessing_pads_like_open_clip(size):
  image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
  scale = 24 / max(size)
  width, height = round(size[0] * scale), round(size[1] * scale)
  padded = Image.new("RGB", (24, 24))
  padded.paste(image.resize((width, height), Image.Resampling.BICUBIC), ((24 - width) // 2, (24 - height) // 2))
  made = hpsv2.preprocessing(24)
  want = (np.asarray(padded, np.float32) / 255 - made.mean) / made.std
  np.testing.assert_allclose(made(image), want, atol=2e-6)


def test_other_files_are_refused_by_name(tmp_path):
  save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
  with pytest.raises(ValueError, match="other.safetensors: not a hpsv2 checkpoint .no visual.conv1.weight"):
    embedders.load("hpsv2", tmp_path)
  with pytest.raises(ValueError, match="copy vocab.json and merges.txt of CLIP"):
    text.open_tower("hpsv2", tmp_path)
