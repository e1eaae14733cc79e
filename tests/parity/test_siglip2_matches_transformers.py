"""SigLIP 2 equals transformers' SiglipModel: features, logits, gradients, names, shapes, counts, and its processor."""

import dataclasses
from pathlib import Path

from encoder_reference import (
  TOLERANCE,
  abstract,
  assert_gradients_match,
  assert_patches_match,
  assert_round_trip,
  assert_same_layout,
  gradients,
  randomize,
  tensors_of,
)
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers.models.siglip import modeling_siglip
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import uae_jax
from uae_jax import embedders, trees
from uae_jax.data.preprocessing import Preprocessing
from uae_jax.embedders import siglip2 as kind
from uae_jax.models.siglip2 import (
  PoolingHead,
  SigLIP2,
  SigLIP2Config,
  SigLIP2Text,
  SigLIP2TextConfig,
  SigLIP2Vision,
  SigLIP2VisionConfig,
)
from uae_jax.weights import siglip2 as weights
from uae_jax.weights.table import load

# 30 px are three patches of 8 and a remainder, like 384 px, which are 27 patches of 14 and a remainder.
VISION = {
  "image_size": 30,
  "patch_size": 8,
  "hidden_size": 48,
  "intermediate_size": 64,
  "num_hidden_layers": 3,
  "num_attention_heads": 3,
}
TEXT = {
  "vocab_size": 50,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "max_position_embeddings": 12,
  "projection_size": 48,
}
SETTINGS = {"model_type": "siglip", "vision_config": VISION, "text_config": TEXT}
TOKENS = np.array([[7, 9, 49, 1, 1, 1], [3, 2, 48, 30, 49, 1]])


def make_model(settings: dict) -> modeling_siglip.SiglipModel:
  arguments = {name: value for name, value in settings.items() if name != "model_type"}
  return modeling_siglip.SiglipModel(transformers.SiglipConfig(**arguments))


@pytest.fixture(scope="module")
def reference() -> modeling_siglip.SiglipModel:
  return randomize(make_model(SETTINGS))


CONFIG = SigLIP2Config.from_huggingface(SETTINGS)


@pytest.mark.parametrize(("size", "unroll"), [((30, 30), False), ((30, 30), True), ((24, 41), False)], ids=str)
def test_image_features_and_gradients(reference, size, unroll):
  """Also at another image size, for which both implementations resize the position table."""
  config = dataclasses.replace(CONFIG.vision, unroll=unroll, remat="full" if unroll else "none")
  rows = weights.vision_table(config)
  graphdef, shapes = abstract(lambda: SigLIP2Vision(config, rngs=nnx.Rngs(0)))
  params = load(tensors_of(reference), rows, shapes, ignored=weights.IGNORED_BY_VISION)
  pixels = np.random.default_rng(0).normal(size=(2, 3, *size)).astype(np.float32)
  inputs = torch.from_numpy(pixels).requires_grad_()
  reference.zero_grad()
  output = reference.get_image_features(inputs, interpolate_pos_encoding=size != (30, 30))
  features = output.pooler_output
  features.sin().sum().backward()

  assert_patches_match(graphdef, params, pixels, output.last_hidden_state)
  ours, input_grads, grads = gradients(graphdef, params, pixels.transpose(0, 2, 3, 1))
  np.testing.assert_allclose(ours, features.detach().numpy(), atol=TOLERANCE)
  np.testing.assert_allclose(np.transpose(input_grads, (0, 3, 1, 2)), inputs.grad.numpy(), atol=TOLERANCE)
  names = (
    "embeddings.patch_embedding.weight",
    "embeddings.position_embedding.weight",
    "encoder.layers.1.self_attn.k_proj.weight",
    "encoder.layers.2.mlp.fc1.bias",
    "head.probe",
    "head.attention.in_proj_weight",
    "head.attention.in_proj_bias",
    "head.attention.out_proj.weight",
    "head.mlp.fc2.weight",
  )
  assert_gradients_match(reference, grads, rows, tuple(f"vision_model.{name}" for name in names))


@pytest.mark.parametrize("tokens", [1, 9, 20])
def test_pooling_head(reference, tokens):
  """Compares the pooling head alone, at the tolerance of a single layer."""
  graphdef, shapes = abstract(lambda: PoolingHead(CONFIG.vision, rngs=nnx.Rngs(0)))
  rows = [
    dataclasses.replace(row, ours=tuple(path.removeprefix("pool/") for path in row.paths))
    for row in weights.vision_table(CONFIG.vision)
    if row.paths[0].startswith("pool/")
  ]
  head = nnx.merge(graphdef, load(tensors_of(reference), rows, shapes, ignored={"": "the rest"}))
  x = np.random.default_rng(0).normal(size=(3, tokens, 48)).astype(np.float32)
  with torch.no_grad():
    want = reference.vision_model.head(torch.from_numpy(x)).numpy()
  np.testing.assert_allclose(head(jnp.asarray(x)), want, atol=1e-5)


@pytest.mark.parametrize("length", [6, 12])
def test_text_features_and_gradients(reference, length):
  """The last token is pooled, whatever it is, and padding is attended to."""
  tokens = np.pad(TOKENS, ((0, 0), (0, length - TOKENS.shape[1])))
  rows = weights.text_table(CONFIG.text)
  graphdef, shapes = abstract(lambda: SigLIP2Text(CONFIG.text, rngs=nnx.Rngs(0)))
  params = load(tensors_of(reference), rows, shapes, ignored=weights.IGNORED_BY_TEXT)
  reference.zero_grad()
  features = reference.get_text_features(torch.from_numpy(tokens)).pooler_output
  features.sin().sum().backward()

  ours, _, grads = gradients(graphdef, params, tokens.astype(np.int32), of_inputs=False)
  np.testing.assert_allclose(ours, features.detach().numpy(), atol=TOLERANCE)
  names = ("embeddings.token_embedding.weight", "encoder.layers.0.self_attn.v_proj.weight", "head.weight", "head.bias")
  assert_gradients_match(reference, grads, rows, tuple(f"text_model.{name}" for name in names))


def test_logits_of_every_pair(reference):
  graphdef, shapes = abstract(lambda: SigLIP2(CONFIG, rngs=nnx.Rngs(0)))
  model = nnx.merge(graphdef, load(tensors_of(reference), weights.table(CONFIG), shapes))
  pixels = np.random.default_rng(0).normal(size=(3, 3, 30, 30)).astype(np.float32)
  with torch.no_grad():
    want = reference(torch.from_numpy(TOKENS), torch.from_numpy(pixels)).logits_per_image.numpy()
  ours = model(jnp.asarray(pixels.transpose(0, 2, 3, 1)), jnp.asarray(TOKENS))
  assert ours.shape == (3, 2)
  np.testing.assert_allclose(ours, want, atol=TOLERANCE)


def test_round_trip_and_ignored_tensors(reference):
  _, shapes = abstract(lambda: SigLIP2(CONFIG, rngs=nnx.Rngs(0)))
  rows, tensors = weights.table(CONFIG), tensors_of(reference)
  assert_round_trip(tensors, rows, shapes)
  old = {f"{tower}.embeddings.position_ids": np.arange(9)[None] for tower in ("text_model", "vision_model")}
  load(tensors | old, rows, shapes, ignored=weights.IGNORED)


BASE = {"vision_config": {}, "text_config": {"vocab_size": 256_000}}
SO400M_TOWER = {
  "hidden_size": 1152,
  "intermediate_size": 4304,
  "num_hidden_layers": 27,
  "num_attention_heads": 16,
}
SO400M = {
  "vision_config": SO400M_TOWER | {"image_size": 384, "patch_size": 14},
  "text_config": SO400M_TOWER | {"vocab_size": 256_000, "projection_size": 1152},
}


@pytest.mark.parametrize(("settings", "config"), [
  (BASE, SigLIP2Config.siglip2_base()),
  (SO400M, SigLIP2Config.siglip2_so400m()),
], ids=["base", "so400m"])  # fmt: skip
def test_published_sizes(settings, config):
  assert SigLIP2Config.from_huggingface(settings) == config
  with torch.device("meta"):
    reference = make_model(settings)
  # The nested format that transformers writes, with every field, describes the same model.
  assert SigLIP2Config.from_huggingface(reference.config.to_dict()) == config
  _, shapes = abstract(lambda: SigLIP2(config, rngs=nnx.Rngs(0)))
  assert_same_layout(reference.state_dict(), weights.table(config), shapes)
  assert trees.count(shapes) == sum(x.numel() for x in reference.parameters())


def test_what_does_not_fit_is_refused():
  for settings, message in (
    ({"model_type": "siglip2"}, "siglip2 is a NaFlex checkpoint.*google/siglip2-base-patch16-224"),
    ({"model_type": "clip"}, "model_type is 'clip', expected 'siglip'"),
    ({"vision_config": {"num_patches": 256}}, "num_patches is of a NaFlex checkpoint"),
    ({"vision_config": {"vision_use_head": False}}, "vision_use_head"),
    ({"vision_config": {"image_size": [224, 112]}}, "image_size"),
    ({"text_config": {"projection_size": 8}}, "width 768.*projection_width 8"),
    ({"vision_config": {"hidden_act": "relu"}}, "activation 'relu'"),
  ):
    with pytest.raises(ValueError, match=message):
      SigLIP2Config.from_huggingface(settings)
  text = nnx.merge(*abstract(lambda: SigLIP2Text(CONFIG.text, rngs=nnx.Rngs(0))))
  with pytest.raises(ValueError, match="13 tokens exceed the 12 positions"):
    text(jnp.zeros((1, 13), jnp.int32))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
  pixels = np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)
  return Image.fromarray(pixels)


PICTURES = [picture(64, 48), picture(47, 93, 1), picture(200, 31, 2), picture(9, 14, 3), picture(30, 30, 4)]


@pytest.mark.parametrize("settings", [{}, {"size": {"height": 24, "width": 24}, "resample": 2}], ids=str)
def test_preprocessing_equals_the_processor(settings):
  ours = Preprocessing.from_huggingface(settings, {"SiglipImageProcessor": kind.PROCESSOR}).batch(PICTURES)
  want = SiglipImageProcessorPil(**settings)(images=PICTURES, return_tensors="np")["pixel_values"]
  np.testing.assert_allclose(ours.transpose(0, 3, 1, 2), want, atol=2e-6)


def test_embedder_of_a_folder(reference, tmp_path):
  processor = SiglipImageProcessorPil(size={"height": 30, "width": 30})
  reference.save_pretrained(tmp_path)
  processor.save_pretrained(tmp_path)
  embedder = embedders.load("siglip2", tmp_path)
  assert embedder.sizes == kind.sizes(CONFIG.vision)
  with torch.no_grad():
    pixels = processor(images=PICTURES, return_tensors="pt")["pixel_values"]
    want = F.normalize(reference.get_image_features(pixels).pooler_output, dim=-1).numpy()
  ours = embedder.embed(PICTURES)
  assert ours.dtype == np.float32
  np.testing.assert_allclose(ours, want, atol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)
  half = embedders.load("siglip2", tmp_path, dtype="bfloat16").embed(PICTURES)
  assert (half * ours).sum(1).min() > 0.99


def test_the_network_inside_a_step_equals_torch_with_its_gradient(reference, tmp_path):
  """Images are resized by bicubic interpolation without antialiasing, as in the cold-start loss."""
  reference.save_pretrained(tmp_path)
  SiglipImageProcessorPil(size={"height": 30, "width": 30}).save_pretrained(tmp_path)
  embedder = embedders.load("siglip2", tmp_path)
  images = np.random.default_rng(0).uniform(-1, 1, size=(2, 40, 52, 3)).astype(np.float32)
  inputs = torch.from_numpy(images).requires_grad_()
  pixels = F.interpolate(inputs.permute(0, 3, 1, 2), size=(30, 30), mode="bicubic", align_corners=False)
  want = F.normalize(reference.get_image_features(pixels).pooler_output, dim=-1)
  want.sin().sum().backward()

  def scalar(images):
    embedding = embedder.network(embedder.params, images)
    return jnp.sin(embedding).sum(), embedding

  grads, ours = jax.jit(jax.grad(scalar, has_aux=True))(jnp.asarray(images))
  np.testing.assert_allclose(ours, want.detach().numpy(), atol=1e-5)
  np.testing.assert_allclose(grads, inputs.grad.numpy(), atol=1e-5)


def test_a_naflex_folder_is_refused_in_one_line(tmp_path):
  tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
  text = tower | {"vocab_size": 20, "max_position_embeddings": 4}
  config = transformers.Siglip2Config(vision_config=tower | {"num_patches": 16}, text_config=text)
  transformers.Siglip2Model(config).save_pretrained(tmp_path)
  with pytest.raises(ValueError, match=r"config\.json: not a siglip2 network \(.*NaFlex") as error:
    embedders.load("siglip2", tmp_path)
  assert "\n" not in str(error.value)


def test_the_kind_is_known_to_no_other_file():
  """A new kind consists of its own files and one row of the registry."""
  package = Path(uae_jax.__file__).parent
  mentions = {str(file.relative_to(package)) for file in package.rglob("*.py") if "siglip2" in file.read_text().lower()}
  own = {"models/siglip2.py", "weights/siglip2.py", "embedders/siglip2.py"}
  assert mentions == own | {"embedders/registry.py"}
  rows = [line for line in (package / "embedders" / "registry.py").read_text().splitlines() if "siglip" in line]
  assert len(rows) == 1


def test_configs_of_towers_are_their_own():
  vision = SigLIP2VisionConfig.siglip2_so400m(512, 16)
  assert (vision.grid, vision.head_width) == (32, 72)
  assert SigLIP2VisionConfig.siglip2_so400m().grid == 27
  assert SigLIP2TextConfig.siglip2_so400m().projection_width == vision.width
