"""DINOv3 equals transformers' DINOv3ViTModel: class token, gradients, names, shapes, counts."""

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
import numpy as np
import pytest
import torch
from transformers import DINOv3ViTConfig
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel

from uae_jax import trees
from uae_jax.models.dinov3 import DINOv3, DINOv3Config
from uae_jax.weights import dinov3 as weights
from uae_jax.weights.table import load

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 8}
KINDS = {
  "vitl": {"num_register_tokens": 4},
  "gated": {"num_register_tokens": 2, "use_gated_mlp": True, "hidden_act": "silu", "query_bias": False},
  "no_registers": {"num_register_tokens": 0, "rope_theta": 50.0, "layer_norm_eps": 1e-3},
}


def make_reference(kind: str) -> tuple[DINOv3ViTModel, DINOv3Config]:
  settings = SMALL | KINDS[kind]
  return randomize(DINOv3ViTModel(DINOv3ViTConfig(**settings))), DINOv3Config.from_huggingface(settings)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(32, 32), (24, 40)], ids=str)
def test_class_token_and_gradients(kind, size):
  reference, config = make_reference(kind)
  graphdef, shapes = abstract(lambda: DINOv3(config, rngs=nnx.Rngs(0)))
  rows = weights.table(config, v5=weights.is_v5(tensors_of(reference)))
  params = load(tensors_of(reference), rows, shapes)
  pixels = np.random.default_rng(1).normal(size=(2, 3, *size)).astype(np.float32)
  inputs = torch.from_numpy(pixels).requires_grad_()
  states = reference(inputs).last_hidden_state
  features = states[:, 0]
  features.sin().sum().backward()

  assert_patches_match(graphdef, params, pixels, states[:, 1 + config.num_registers :])
  ours, input_grads, grads = gradients(graphdef, params, pixels.transpose(0, 2, 3, 1))
  np.testing.assert_allclose(ours, features.detach().numpy(), atol=TOLERANCE)
  np.testing.assert_allclose(np.transpose(input_grads, (0, 3, 1, 2)), inputs.grad.numpy(), atol=TOLERANCE)
  names = ("attention.q_proj.weight", "attention.k_proj.weight", "mlp.up_proj.weight", "layer_scale2.lambda1")
  names = tuple(f"model.layer.1.{name}" for name in names)
  assert_gradients_match(reference, grads, rows, names + ("embeddings.cls_token", "norm.bias"))


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_under_both_names(kind):
  reference, config = make_reference(kind)
  _, shapes = abstract(lambda: DINOv3(config, rngs=nnx.Rngs(0)))
  tensors = tensors_of(reference)
  assert weights.is_v5(tensors)
  assert_round_trip(tensors, weights.table(config, v5=True), shapes)
  old = {name.removeprefix("model."): value for name, value in tensors.items()}
  assert not weights.is_v5(old)
  assert_round_trip(old, weights.table(config), shapes)


def test_published_vitl16():
  settings = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
  settings |= {"num_register_tokens": 4}
  config = DINOv3Config.dinov3_vitl16()
  assert DINOv3Config.from_huggingface(settings) == config
  with torch.device("meta"):
    reference = DINOv3ViTModel(DINOv3ViTConfig(**settings))
  _, shapes = abstract(lambda: DINOv3(config, rngs=nnx.Rngs(0)))
  assert_same_layout(reference.state_dict(), weights.table(config, v5=True), shapes)
  assert trees.count(shapes) == 303_129_600
