"""Shared by the parity tests of image and text embedders: random torch references, and comparisons."""

from collections.abc import Callable, Mapping
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from uae_jax import sharding, trees
from uae_jax.weights.table import WeightError, dump, load, specs

TOLERANCE = 2e-5


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
  """Randomizes every parameter at a significant scale, including scales and biases of norms."""
  torch.set_num_threads(1)
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      if parameter.ndim == 2 and "embedding" not in name and "token" not in name:
        parameter.copy_(noise / parameter.shape[1] ** 0.5)
      elif "norm" in name and name.endswith("weight") or "lambda" in name:
        parameter.copy_(1 + 0.3 * noise)
      else:
        parameter.copy_(0.3 * noise)
  return model.eval()


def tensors_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
  return {name: value.detach().numpy() for name, value in model.state_dict().items()}


def abstract(build: Callable[[], nnx.Module]):
  """(graphdef, shapes) of a model on one device."""
  return sharding.abstract_model(build, sharding.make_mesh(devices=jax.devices()[:1]))


def gradients(graphdef, params: dict, inputs: np.ndarray, *, of_inputs: bool = True):
  """(outputs, gradient of the inputs, gradient of the parameters) of sum(sin(outputs))."""

  def scalar(inputs, params):
    outputs = nnx.merge(graphdef, params)(inputs)
    return jnp.sum(jnp.sin(outputs)), outputs

  argnums = (0, 1) if of_inputs else 1
  (_, outputs), grads = jax.jit(jax.value_and_grad(scalar, argnums=argnums, has_aux=True))(jnp.asarray(inputs), params)
  return (outputs, *grads) if of_inputs else (outputs, None, grads)


def assert_patches_match(graphdef, params: dict, pixels: np.ndarray, want: torch.Tensor) -> None:
  """Compares the states of the patches of pixels float[B, 3, H, W]."""
  ours = jax.jit(lambda params, x: nnx.merge(graphdef, params).patch_states(x))(params, pixels.transpose(0, 2, 3, 1))
  np.testing.assert_allclose(ours, want.detach().numpy(), atol=TOLERANCE)


def assert_gradients_match(model: torch.nn.Module, grads: dict, rows, names: tuple[str, ...]) -> None:
  """Compares our gradients, under torch names, with `.grad` of some parameters."""
  theirs = dict(model.named_parameters())
  ours = dump(grads, rows)
  for name in names:
    want = theirs[name].grad.numpy()
    np.testing.assert_allclose(ours[name], want, atol=5e-5 * max(1, np.abs(want).max()), err_msg=name)


def assert_round_trip(tensors: dict, rows, shapes: dict) -> None:
  """Asserts that dump(load(x)) is x bit for bit, and that a missing or extra tensor is an error that names it."""
  back = dump(load(tensors, rows, shapes), rows)
  assert back.keys() == tensors.keys()
  for name, value in tensors.items():
    np.testing.assert_array_equal(back[name], value)
  victim = sorted(tensors)[len(tensors) // 2]
  with pytest.raises(WeightError, match=f"missing {victim}"):
    load({name: value for name, value in tensors.items() if name != victim}, rows, shapes)
  with pytest.raises(WeightError, match="unexpected surplus"):
    load(tensors | {"surplus": np.zeros(2)}, rows, shapes)


def assert_same_layout(reference: Mapping, rows, shapes: dict) -> None:
  """Asserts that our full-size model has exactly the tensors of the reference's state dict, with equal shapes."""
  theirs = {name: tuple(value.shape) for name, value in reference.items()}
  ours = {name: spec.shape for name, spec in specs(rows, shapes).items()}
  assert ours == theirs
  assert trees.count(shapes) == sum(math.prod(shape) for shape in theirs.values())
