"""At full size no large array is replicated: parameters, adapters, master copies and both moments are sharded."""

from pathlib import Path

from flax import nnx
import jax
import numpy as np
import pytest

from uae_jax import sharding, trees
from uae_jax.commands.config_file import load_config
from uae_jax.layers import lora
from uae_jax.models.uae import UAE, UAEConfig
from uae_jax.options import OptimizerOptions, read_config
from uae_jax.sharding import mesh_axes
from uae_jax.training import placement, state
from uae_jax.training.optimizer import make_optimizer
from uae_jax.training.stage import params_before

CONFIG = Path(__file__).parents[2] / "configs" / "uae_3b_sd35l.py"
MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def full():
  mesh = sharding.make_mesh(fsdp=4, tensor=2)
  return mesh, sharding.abstract_model(lambda: UAE(UAEConfig.uae_3b_sd35_large(), rngs=nnx.Rngs(0)), mesh)[1]


def cut_over(leaf) -> set[str]:
  return {axis for rule in leaf.sharding.spec for axis in mesh_axes(rule)}


def test_every_large_parameter_is_cut(full):
  """By rule, vectors and convolutions are replicated: the VAE has only 84 million weights."""
  whole = {
    path
    for path, leaf in trees.items(full[1])
    if np.prod(leaf.shape) * 2 > MEBIBYTE and "fsdp" not in cut_over(leaf) and not path.startswith("vae/")
    if not path.endswith("/bias")
  }
  assert whole == {"decoder/time_in/kernel"}


def test_both_factors_of_every_adapter_are_cut(full):
  factors = [leaf for path, leaf in trees.items(full[1]) if lora.is_adapter(path)]
  assert factors and all("fsdp" in cut_over(leaf) for leaf in factors)


def test_of_the_nets_before_a_stage_only_what_stage_3_trains_is_kept(full):
  params = full[1]
  config = read_config(load_config(str(CONFIG)))
  kept = {name: params_before(config, name, params) for name in config.stages}
  assert [name for name in config.stages if kept[name]] == ["understanding_for_generation"]
  paths = {path for path, _ in trees.items(kept["understanding_for_generation"])}
  assert paths == {path for path, _ in trees.items(params) if path.startswith("decoder/") and lora.is_adapter(path)}


def test_a_state_lies_as_its_parameters_do(full):
  mesh, params = full
  optimizer = make_optimizer(OptimizerOptions(learning_rate=1e-4), 10)

  def init(params, key):
    return state.create(params, lora.is_adapter, optimizer, key, has_ema=True)

  made = placement.abstract_state(init, params, mesh)
  wanted = {path: leaf.sharding for path, leaf in trees.items(params) if lora.is_adapter(path)}
  copies = [made.trainable, made.ema]
  for part in jax.tree.leaves(made.opt_state, is_leaf=lambda x: isinstance(x, dict)):
    copies += [part] if isinstance(part, dict) else []
  assert len(copies) == 4
  for copy in copies:
    assert {path: leaf.sharding for path, leaf in trees.items(copy)} == wanted
