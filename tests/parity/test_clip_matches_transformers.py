"""CLIP equals transformers' CLIPModel and CLIPTextModelWithProjection: features, gradients, names, shapes, counts."""

import dataclasses

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
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.clip import modeling_clip

from uae_jax import trees
from uae_jax.models.clip import CLIP, CLIPConfig, CLIPText, CLIPTextConfig, CLIPVision
from uae_jax.weights import clip as weights
from uae_jax.weights.table import load

TEXT = {
  "vocab_size": 50,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "max_position_embeddings": 20,
  "projection_dim": 24,
  "eos_token_id": 2,
}
VISION = {
  "image_size": 30,
  "patch_size": 8,
  "hidden_size": 48,
  "intermediate_size": 64,
  "num_hidden_layers": 3,
  "num_attention_heads": 3,
}
TOKENS = np.array([[0, 7, 9, 49, 49, 49], [0, 2, 48, 30, 49, 1]])


def make_reference(**text) -> tuple[modeling_clip.CLIPModel, CLIPConfig]:
  settings = {"text_config": TEXT | text, "vision_config": VISION, "projection_dim": 24}
  reference = randomize(modeling_clip.CLIPModel(transformers.CLIPConfig(**settings)))
  return reference, CLIPConfig.from_huggingface(settings)


@pytest.mark.parametrize("unroll", [False, True])
def test_image_features_and_gradients(unroll):
  reference, config = make_reference()
  config = dataclasses.replace(config.vision, unroll=unroll, remat="full" if unroll else "none")
  rows = weights.vision_table(config)
  graphdef, shapes = abstract(lambda: CLIPVision(config, rngs=nnx.Rngs(0)))
  params = load(tensors_of(reference), rows, shapes, ignored=weights.IGNORED_BY_VISION)
  pixels = np.random.default_rng(0).normal(size=(2, 3, 30, 30)).astype(np.float32)
  inputs = torch.from_numpy(pixels).requires_grad_()
  output = reference.get_image_features(inputs)
  features, states = output.pooler_output, reference.vision_model.post_layernorm(output.last_hidden_state)
  features.sin().sum().backward()

  assert_patches_match(graphdef, params, pixels, states[:, 1:])
  ours, input_grads, grads = gradients(graphdef, params, pixels.transpose(0, 2, 3, 1))
  np.testing.assert_allclose(ours, features.detach().numpy(), atol=TOLERANCE)
  np.testing.assert_allclose(np.transpose(input_grads, (0, 3, 1, 2)), inputs.grad.numpy(), atol=TOLERANCE)
  names = ("embeddings.patch_embedding.weight", "pre_layrnorm.weight", "encoder.layers.1.self_attn.k_proj.weight")
  names = tuple(f"vision_model.{name}" for name in names) + ("vision_model.encoder.layers.2.mlp.fc1.bias",)
  assert_gradients_match(reference, grads, rows, names + ("visual_projection.weight",))


@pytest.mark.parametrize(("eos", "activation"), [(2, "quick_gelu"), (49, "gelu")])
def test_text_features_and_gradients(eos, activation):
  reference, config = make_reference(eos_token_id=eos, hidden_act=activation)
  rows = weights.text_table(config.text)
  graphdef, shapes = abstract(lambda: CLIPText(config.text, rngs=nnx.Rngs(0)))
  params = load(tensors_of(reference), rows, shapes, ignored=weights.IGNORED_BY_TEXT)
  features = reference.get_text_features(torch.from_numpy(TOKENS)).pooler_output
  features.sin().sum().backward()

  ours, _, grads = gradients(graphdef, params, TOKENS.astype(np.int32), of_inputs=False)
  np.testing.assert_allclose(ours, features.detach().numpy(), atol=TOLERANCE)
  names = ("embeddings.token_embedding.weight", "encoder.layers.0.self_attn.v_proj.weight", "final_layer_norm.bias")
  assert_gradients_match(reference, grads, rows, tuple(f"text_model.{name}" for name in names))


def test_pooled_embedding_of_a_text_encoder_of_sd3():
  settings = TEXT | {"hidden_act": "gelu", "eos_token_id": 49}
  reference = randomize(modeling_clip.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**settings)))
  config = CLIPTextConfig.from_huggingface(settings)
  graphdef, shapes = abstract(lambda: CLIPText(config, rngs=nnx.Rngs(0)))
  rows = weights.text_table(config)
  model = nnx.merge(graphdef, load(tensors_of(reference), rows, shapes))
  with torch.no_grad():
    want = reference(torch.from_numpy(TOKENS)).text_embeds.numpy()
  np.testing.assert_allclose(model(jnp.asarray(TOKENS)), want, atol=TOLERANCE)
  assert_round_trip(tensors_of(reference), rows, shapes)


def test_what_follows_the_end_has_no_influence():
  _, config = make_reference(eos_token_id=49)
  with nnx.use_eager_sharding(False):
    model = CLIPText(config.text, rngs=nnx.Rngs(0))
  short, long = TOKENS[:1, :4], np.concatenate([TOKENS[:1, :4], [[5, 49, 11]]], axis=1)
  np.testing.assert_allclose(model(jnp.asarray(short)), model(jnp.asarray(long)), atol=1e-6)


def test_round_trip_and_ignored_tensors():
  reference, config = make_reference()
  _, shapes = abstract(lambda: CLIP(config, rngs=nnx.Rngs(0)))
  rows, tensors = weights.table(config), tensors_of(reference)
  assert_round_trip(tensors, rows, shapes)
  old = {f"{tower}.embeddings.position_ids": np.arange(20)[None] for tower in ("text_model", "vision_model")}
  load(tensors | old, rows, shapes, ignored=weights.IGNORED)


def test_wrong_inputs_are_refused():
  _, config = make_reference()
  model = nnx.merge(*abstract(lambda: CLIP(config, rngs=nnx.Rngs(0))))
  with pytest.raises(ValueError, match="image_px"):
    model.vision(jnp.zeros((1, 32, 32, 3)))
  with pytest.raises(ValueError, match="max_tokens"):
    model.text(jnp.zeros((1, 21), jnp.int32))
  with pytest.raises(ValueError, match="activation 'relu'"):
    dataclasses.replace(config.vision, activation="relu")
  with pytest.raises(ValueError, match="projection_width"):
    dataclasses.replace(config, text=dataclasses.replace(config.text, projection_width=8))


def test_published_clip_vit_l14():
  vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
  text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "eos_token_id": 2}
  settings = {"text_config": text, "vision_config": vision | {"patch_size": 14}, "projection_dim": 768}
  config = CLIPConfig.clip_vit_l14()
  assert CLIPConfig.from_huggingface(settings) == config
  with torch.device("meta"):
    reference = modeling_clip.CLIPModel(transformers.CLIPConfig(**settings))
  _, shapes = abstract(lambda: CLIP(config, rngs=nnx.Rngs(0)))
  assert_same_layout(reference.state_dict(), weights.table(config), shapes)
  assert trees.count(shapes) == 427_616_513


def test_published_bigg_text():
  settings = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
  settings |= {"hidden_act": "gelu", "eos_token_id": 2, "projection_dim": 1280}
  config = CLIPTextConfig.clip_bigg_text()
  assert CLIPTextConfig.from_huggingface(settings) == config
  with torch.device("meta"):
    reference = modeling_clip.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**settings))
  _, shapes = abstract(lambda: CLIPText(config, rngs=nnx.Rngs(0)))
  assert_same_layout(reference.state_dict(), weights.text_table(config), shapes)
  assert trees.count(shapes) == 694_659_840
