"""Texts are embedded as by the libraries: tokenizer, padding, cuts and text tower, from the published files."""

import json

from encoder_reference import randomize
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPTokenizer, PreTrainedTokenizerFast, SiglipConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.modeling_clip import CLIPModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip.modeling_siglip import SiglipModel

from uae_jax.embedders import text
from uae_jax.rewards.image_text import ImageTextReward

VISION = {"image_size": 24, "patch_size": 8, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
TEXTS = ["a cab", "Fed", "abcdefgh abcdefgh ab"]
MAX_TOKENS = 12


def write_clip_tokenizer(folder) -> CLIPTokenizer:
  vocabulary = ["!", *LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
  (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
  (folder / "merges.txt").write_text("#version: 0.2\n")
  return CLIPTokenizer.from_pretrained(folder)


def write_clip(folder):
  tokenizer = write_clip_tokenizer(folder)
  settings = TEXT | {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS, "eos_token_id": 2}
  vision = VISION | {"num_attention_heads": 2}
  model = randomize(CLIPModel(CLIPConfig(vision_config=vision, text_config=settings, projection_dim=12)))
  CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}).save_pretrained(folder)
  return model, tokenizer


def write_siglip2(folder):
  from tokenizers import Tokenizer, models, pre_tokenizers, processors

  words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *LETTERS])}
  made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
  made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
  made.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
  tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
  tokenizer.save_pretrained(folder)
  settings = TEXT | {"vocab_size": len(words), "max_position_embeddings": MAX_TOKENS, "projection_size": 32}
  vision = VISION | {"num_attention_heads": 2}
  model = randomize(SiglipModel(SiglipConfig(vision_config=vision, text_config=settings)))
  SiglipImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(folder)
  return model, tokenizer


@pytest.mark.parametrize("kind, write", [("clip", write_clip), ("siglip2", write_siglip2)])
def test_text_embeddings_equal_the_library(tmp_path, kind, write):
  model, tokenizer = write(tmp_path)
  model.save_pretrained(tmp_path)
  texts = [line.lower() for line in TEXTS]
  inputs = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
  with torch.no_grad():
    features = model.get_text_features(input_ids=inputs["input_ids"]).pooler_output
  loaded = text.load(kind, tmp_path)
  ours, lengths = loaded.text.embed(TEXTS)
  np.testing.assert_allclose(ours, F.normalize(features, dim=-1).numpy(), atol=2e-5)
  assert lengths == [len(tokenizer(line)["input_ids"]) for line in texts] and loaded.text.max_tokens == MAX_TOKENS
  assert max(lengths) > MAX_TOKENS and ours.shape[1] == loaded.embed([np.zeros((9, 9, 3), np.uint8)]).shape[1]
  for wrong, message in (
    ([], "no texts"),
    ("cat", "texts is one text"),
    (["a", "b" * 32_001], r"texts\[1\] has 32001"),
  ):
    with pytest.raises(ValueError, match=message):
      loaded.text.embed(wrong)


def test_the_reward_is_the_cosine_of_the_library(tmp_path):
  model, tokenizer = write_clip(tmp_path)
  model.save_pretrained(tmp_path)
  images = np.random.default_rng(0).integers(0, 256, (2, 3, 24, 24, 3), dtype=np.uint8)
  captions = [["a cab"] * 3, ["fed", "a cab", "dad"]]
  rewards = ImageTextReward(lambda: text.load("clip", tmp_path))(captions, images)
  processor = CLIPImageProcessorPil.from_pretrained(tmp_path)
  for i, group in enumerate(captions):
    inputs = tokenizer(group, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    pixels = processor(images=list(images[i]), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
      found = model(pixel_values=pixels, input_ids=inputs["input_ids"])
    expected = torch.sum(found.image_embeds * found.text_embeds, dim=-1)
    np.testing.assert_allclose(rewards[i], expected.numpy(), atol=2e-5)


def test_long_clip_needs_the_tokenizer_of_clip(tmp_path):
  (tmp_path / "longclip.pt").write_bytes(b"")
  with pytest.raises(ValueError, match="copy vocab.json and merges.txt of CLIP"):
    text.open_tower("longclip", tmp_path)
  with pytest.raises(ValueError, match="dinov2 has no text tower"):
    text.load("dinov2", tmp_path)
