"""DINOv2, with and without registers, equals transformers: class token, gradients, names, shapes, counts."""

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
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import Dinov2Config, Dinov2WithRegistersConfig
from transformers.models.dinov2.modeling_dinov2 import Dinov2Model
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersModel

from uae_jax import trees
from uae_jax.layers.resize import resize
from uae_jax.models.dinov2 import DINOv2, DINOv2Config
from uae_jax.weights import dinov2 as weights
from uae_jax.weights.table import load

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 42, "patch_size": 7}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 518, "patch_size": 14}
KINDS = {
  "plain": (Dinov2Model, Dinov2Config, {"model_type": "dinov2"}),
  "registers": (
    Dinov2WithRegistersModel,
    Dinov2WithRegistersConfig,
    {"model_type": "dinov2_with_registers", "num_register_tokens": 4},
  ),
}


def make_reference(kind: str, settings: dict):
  model, config, extra = KINDS[kind]
  arguments = {name: value for name, value in (settings | extra).items() if name != "model_type"}
  return model(config(**arguments)), DINOv2Config.from_huggingface(settings | extra)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(42, 42), (35, 63), (46, 31)], ids=str)
def test_class_token_and_gradients(kind, size):
  """Includes resized position tables and images whose side is not a multiple of the patch."""
  reference, config = make_reference(kind, SMALL)
  randomize(reference)
  graphdef, shapes = abstract(lambda: DINOv2(config, rngs=nnx.Rngs(0)))
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
  names = ("embeddings.position_embeddings", "encoder.layer.1.layer_scale1.lambda1", "encoder.layer.0.mlp.fc2.weight")
  assert_gradients_match(reference, grads, rows, names + ("embeddings.cls_token", "layernorm.weight"))


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_under_both_names(kind):
  reference, config = make_reference(kind, SMALL)
  randomize(reference)
  _, shapes = abstract(lambda: DINOv2(config, rngs=nnx.Rngs(0)))
  tensors = tensors_of(reference)
  assert weights.is_v5(tensors)
  assert_round_trip(tensors, weights.table(config, v5=True), shapes)
  renames = {ours: theirs for ours, theirs in zip(weights.BLOCK_V5.values(), weights.BLOCK.values(), strict=True)}
  old = {}
  for name, value in tensors.items():
    for ours, theirs in renames.items():
      name = name.replace(f".{ours}.", f".{theirs}.")
    old[name] = value
  assert not weights.is_v5(old)
  assert_round_trip(old, weights.table(config), shapes)


@pytest.mark.parametrize(("kind", "ours", "count"), [
  ("plain", DINOv2Config.dinov2_large(), 304_368_640),
  ("registers", DINOv2Config.dinov2_large_registers(), 304_372_736),
])  # fmt: skip
def test_published_large(kind, ours, count):
  with torch.device("meta"):
    reference, config = make_reference(kind, LARGE)
  assert config == ours
  _, shapes = abstract(lambda: DINOv2(ours, rngs=nnx.Rngs(0)))
  assert_same_layout(reference.state_dict(), weights.table(ours, v5=True), shapes)
  assert trees.count(shapes) == count


def test_swiglu_is_refused():
  with pytest.raises(ValueError, match="use_swiglu_ffn"):
    DINOv2Config.from_huggingface({"use_swiglu_ffn": True})


SIZES = [(80, 96, 56, 56), (37, 37, 16, 16), (5, 5, 9, 4), (31, 20, 64, 50), (300, 200, 22, 24), (8, 8, 8, 8)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
@pytest.mark.parametrize("antialias", [False, True])
def test_resize_equals_torch(sizes, method, antialias):
  height, width, *target = sizes
  x = np.random.default_rng(2).normal(size=(2, 3, height, width)).astype(np.float32)
  inputs = torch.from_numpy(x).requires_grad_()
  want = F.interpolate(inputs, size=tuple(target), mode=method, align_corners=False, antialias=antialias)
  want.sin().sum().backward()

  def scalar(x):
    y = resize(x, *target, method=method, antialias=antialias)
    return jax.numpy.sin(y).sum(), y

  grads, ours = jax.grad(scalar, has_aux=True)(x.transpose(0, 2, 3, 1))
  np.testing.assert_allclose(np.transpose(ours, (0, 3, 1, 2)), want.detach().numpy(), atol=1e-5)
  np.testing.assert_allclose(np.transpose(grads, (0, 3, 1, 2)), inputs.grad.numpy(), atol=1e-5)
