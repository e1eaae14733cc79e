"""The connector equals the `nn.Sequential(Linear, GELU, Linear)` of the official checkpoints, both ways."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from uae_jax import sharding, trees
from uae_jax.models.connector import Connector, ConnectorConfig
from uae_jax.weights import connector as weights
from uae_jax.weights.table import WeightError, dump, load

CONFIG = ConnectorConfig(in_width=12, hidden_width=40, out_width=20)


class Reference(torch.nn.Module):
  """The module of the official code, for its parameter names."""

  def __init__(self, config: ConnectorConfig):
    super().__init__()
    self.projector = torch.nn.Sequential(
      torch.nn.Linear(config.in_width, config.hidden_width),
      torch.nn.GELU(),
      torch.nn.Linear(config.hidden_width, config.out_width),
    )

  def forward(self, x):
    return self.projector(x)


@pytest.fixture(scope="module")
def reference():
  torch.set_num_threads(1)
  torch.manual_seed(0)
  return Reference(CONFIG)


@pytest.fixture(scope="module")
def tensors(reference):
  return {name: value.numpy() for name, value in reference.state_dict().items()}


@pytest.fixture(scope="module")
def abstract():
  return sharding.abstract_model(lambda: Connector(CONFIG, rngs=nnx.Rngs(0)), sharding.make_mesh(8))


def test_output_and_gradients(reference, tensors, abstract):
  graphdef, shapes = abstract
  params = load(tensors, weights.table(CONFIG), shapes)
  x = np.random.default_rng(0).normal(size=(2, 5, CONFIG.in_width)).astype(np.float32) * 2

  hidden = torch.tensor(x, requires_grad=True)
  want = reference(hidden)
  torch.sum(want**2).backward()
  out = nnx.merge(graphdef, params)(jnp.asarray(x))
  np.testing.assert_allclose(out, want.detach(), atol=1e-6)

  def loss(params, x):
    return jnp.sum(nnx.merge(graphdef, params)(x) ** 2)

  grads, grad_x = jax.grad(loss, argnums=(0, 1))(params, jnp.asarray(x))
  np.testing.assert_allclose(grad_x, hidden.grad, atol=1e-5)
  for name, value in dump(grads, weights.table(CONFIG)).items():
    np.testing.assert_allclose(value, dict(reference.named_parameters())[name].grad, atol=2e-5, err_msg=name)


def test_round_trip_is_exact(tensors, abstract):
  back = dump(load(tensors, weights.table(CONFIG), abstract[1]), weights.table(CONFIG))
  assert back.keys() == tensors.keys()
  assert all(np.array_equal(back[name], tensors[name]) for name in tensors)


def test_a_missing_tensor_raises_and_the_language_model_is_ignored(tensors, abstract):
  table = weights.table(CONFIG)
  load(tensors | {"model.norm.weight": np.zeros(3)}, table, abstract[1], ignored=weights.IGNORED)
  with pytest.raises(WeightError, match="projector.1.weight"):
    load(tensors | {"projector.1.weight": np.zeros(3)}, table, abstract[1], ignored=weights.IGNORED)
  with pytest.raises(WeightError, match="missing projector.2.bias"):
    load({k: v for k, v in tensors.items() if k != "projector.2.bias"}, table, abstract[1])


def test_full_size():
  config = ConnectorConfig.uae()
  _, shapes = sharding.abstract_model(lambda: Connector(config, rngs=nnx.Rngs(0)), sharding.make_mesh(2, 2, 2))
  assert trees.count(shapes) == 2048 * 8192 + 8192 + 8192 * 4096 + 4096
