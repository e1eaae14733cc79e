"""Frozen weights as int8 in training: exact ratios, straight-through gradients, the original weights at the end."""

import dataclasses
import re

from flax import nnx
import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np
import pytest

from tests.properties.rl_world import CONFIG, batch, built, mesh, params, state_of
from tests.properties.test_rl_steps import ADVANTAGES, STAGES, moved
from uae_jax import sharding, trees
from uae_jax.layers import lora
from uae_jax.layers.quantized import KERNELS, Int8Weight, product, quantized_weight
from uae_jax.models.mmdit import MMDiT
from uae_jax.options import ColdStartStage, GenerationForUnderstandingStage, UnderstandingForGenerationStage
from uae_jax.planning.stage_programs import bytes_per_device
from uae_jax.training import frozen_weights
from uae_jax.training.checkpoints import Checkpoints
from uae_jax.training.flops import inner_jaxprs
from uae_jax.training.rehearsal import check_stage
from uae_jax.training.rl import update as update_module
from uae_jax.training.stage import is_trainable, make_stage

STAGE2, STAGE3 = "generation_for_understanding", "understanding_for_generation"
SECTIONS = {"captioner": GenerationForUnderstandingStage, "decoder": UnderstandingForGenerationStage}
X = jax.random.normal(jax.random.key(0), (6, 64)).at[2].set(0.0)
KERNEL = jax.random.normal(jax.random.key(1), (64, 32)) * jnp.arange(1, 33) / 256
NO_AXES = (None, None)


def copies() -> dict:
  """The parameters of the small world on its mesh, as new arrays that may be deleted."""
  return jax.device_put(jax.tree.map(np.array, params()), built().shardings)


def config_with(name: str, **fields):
  return dataclasses.replace(CONFIG, **{name: dataclasses.replace(CONFIG.section(name), **fields)})


@pytest.mark.parametrize("rounds", [False, True])
def test_a_product_with_its_straight_through_gradient(rounds):
  weight = quantized_weight(KERNEL, rounds_activations=rounds)
  dequantized = weight.values * weight.scale
  rows = X
  if rounds:
    of_rows = quantized_weight(X.T)  # one scale per row of X
    rows = (of_rows.values * of_rows.scale).T

  def loss(x):
    return jnp.sum(jnp.sin(product(x, weight, NO_AXES)))

  np.testing.assert_allclose(product(X, weight, NO_AXES), rows @ dequantized, rtol=1e-5, atol=1e-4)
  expected = jnp.cos(rows @ dequantized) @ dequantized.T
  np.testing.assert_allclose(jax.grad(loss)(X), expected, rtol=1e-4, atol=1e-4)
  text = str(jax.make_jaxpr(lambda x: product(x, weight, NO_AXES))(X))
  assert ("preferred_element_type=int32" in text) == rounds
  assert product(X.astype(jnp.bfloat16), weight, NO_AXES).dtype == jnp.bfloat16


def test_all_gathers_move_int8():
  kernel = jax.device_put(KERNEL, sharding.replicated(mesh()).update(spec=jax.P("fsdp")))
  weight = quantized_weight(kernel, rounds_activations=True)
  assert weight.values.sharding.is_equivalent_to(kernel.sharding, 2) and weight.scale.is_fully_replicated
  with jax.set_mesh(mesh()):
    text = jax.jit(lambda x, weight: product(x, weight, ("embed", None))).lower(X, weight).compile().as_text()
  assert re.findall(r"(\w+)\[64,32\]\S* all-gather\(", text) == ["s8"]


@pytest.mark.parametrize("net", [pytest.param("captioner", marks=pytest.mark.slow), "decoder"])
def test_the_first_of_several_updates_has_ratio_one_on_a_mesh(net, monkeypatch):
  """Rollout, replay and reference share the rounded weights.

  With adapters that are still zero the policy is the reference. XLA fuses the two differently; the last bit of a float
  can move an activation to the next of its 255 values, so the KL is small, and not 0 as with float weights.
  """
  monkeypatch.setattr(update_module, "_over_updates", lambda name, values: values[0])
  plain = trees.from_items(
    (path, jnp.zeros_like(leaf) if path.endswith("lora_b") else leaf) for path, leaf in trees.items(copies())
  )
  rounded, _ = frozen_weights.rounded(SECTIONS[net](frozen_weights="int8"), plain, 1.0)
  phases = STAGES[net](num_minibatches=2)
  rows = jax.device_put(batch(), sharding.batch_sharding(mesh()).update(spec=jax.P("data")))
  with jax.set_mesh(mesh()):
    state = state_of(net, rounded)
    trajectory = jax.jit(phases.rollout)(state.params, rows, jax.random.key(1), state.step)
    after, metrics = jax.jit(phases.update)(state, rows, trajectory, ADVANTAGES)
  assert metrics["ratio_mean"] == 1.0
  for name in ("ratio_variance", "clip_fraction", "approximate_kl"):
    assert metrics[name] == 0.0, name
  assert metrics["kl"] < (1e-3 if net == "captioner" else 1e-5)
  assert moved(after, state)
  assert jax.tree.all(jax.tree.map(np.array_equal, after.frozen, state.frozen))


def test_a_stage_holds_int8_and_ends_with_the_original_weights(tmp_path):
  config = config_with(STAGE3, frozen_weights="int8")
  with jax.set_mesh(mesh()):
    stage = make_stage(config, STAGE3, built(), copies(), seed=0)
    checkpoints = Checkpoints(tmp_path / STAGE3)
    checkpoints.save(1, dataclasses.replace(stage.state, loss_average=jnp.float32(1)), {}, {})
    checkpoints.wait()
    # A later process starts from the same weights, and reads what was trained.
    _, frozen = trees.split(
      frozen_weights.rounded(config.section(STAGE3), copies(), 1.0)[0], is_trainable(config.section(STAGE3))
    )
    later = dataclasses.replace(
      stage.state, trainable=jax.tree.map(jnp.zeros_like, stage.state.trainable), frozen=frozen
    )
    resumed, _ = checkpoints.restore(later)
    ended = dict(trees.items(stage.finish(stage.state.params, batch()["image"])))
  checkpoints.close()
  kernels = {path: leaf for path, leaf in trees.items(stage.state.params) if re.search(KERNELS, path)}
  assert len(kernels) > 20
  for path, leaf in kernels.items():
    assert isinstance(leaf, Int8Weight) and leaf.rounds_activations, path
  assert bytes_per_device(kernels) < 0.3 * bytes_per_device([dict(trees.items(copies()))[path] for path in kernels])
  assert jax.tree.all(jax.tree.map(np.array_equal, resumed.params, stage.state.params))
  for path, original in trees.items(params()):
    np.testing.assert_array_equal(ended.pop(path), original, err_msg=path)
  assert not ended


def test_adapters_of_a_decoder_that_does_not_train_are_rounded_with_its_weights():
  """Those of the captioner stay apart, as do both in stage 3, which trains the decoder."""
  forms = {
    name: dict(trees.items(frozen_weights.abstract(config_with(name, frozen_weights="int8").section(name), tree)))
    for name, tree in ((STAGE2, built().abstract_params), (STAGE3, built().abstract_params))
  }
  for name, leaves in forms.items():
    weights = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, Int8Weight)}
    assert {path.split("/")[0] for path, leaf in weights.items() if leaf.has_adapter} == (
      {"decoder"} if name == STAGE2 else set()
    )

  layer = lora.Linear(64, 32, axes=NO_AXES, rngs=nnx.Rngs(0))
  lora.attach(layer, lora.LoRA(4, 8.0), rngs=nnx.Rngs(1))
  layer.lora_b[...] = jax.random.normal(jax.random.key(2), (4, 32))
  tree = {"decoder": {"last": nnx.to_pure_dict(nnx.state(layer))}}
  expected = layer(X)
  rounded, originals = frozen_weights.rounded(GenerationForUnderstandingStage(frozen_weights="int8_weights"), tree, 2.0)
  nnx.update(layer, rounded["decoder"]["last"])
  np.testing.assert_allclose(layer(X), expected, atol=0.02 * np.max(np.abs(expected)))
  assert rounded["decoder"]["last"]["kernel"].has_adapter and set(originals) == {"decoder/last/kernel"}
  with pytest.raises(ValueError, match="cannot be off"):
    lora.adapters_off(layer)(X)


def shapes_of_floats(jaxpr: core.Jaxpr) -> set[tuple[int, ...]]:
  """Shapes of all float arrays that a program computes, in its loops as well."""
  found = {
    variable.aval.shape
    for equation in jaxpr.eqns
    for variable in equation.outvars
    if jnp.issubdtype(variable.aval.dtype, jnp.floating)
  }
  return found.union(*(shapes_of_floats(inner) for equation in jaxpr.eqns for inner in inner_jaxprs(equation.params)))


def test_a_gradient_makes_no_float_copy_of_the_layers():
  sizes = dataclasses.replace(built().networks.uae(params()).config.decoder, depth=4, remat="full")
  graphdef, decoder = nnx.split(MMDiT(sizes, rngs=nnx.Rngs(0)))
  kernels = {
    path: leaf for path, leaf in trees.items(nnx.to_pure_dict(decoder)) if re.search("^layers/.*kernel$", path)
  }
  rounded = trees.from_items((path, quantized_weight(leaf)) for path, leaf in kernels.items())

  def loss(latents, weights):
    model = nnx.merge(graphdef, trees.replace(nnx.to_pure_dict(decoder), weights))
    context, pooled = jnp.ones((2, 5, sizes.context_width)), jnp.ones((2, sizes.pooled_width))
    return jnp.sum(model(latents, jnp.ones(2), context, pooled))

  latents = jnp.ones((2, 4, 4, sizes.in_channels))
  found = shapes_of_floats(jax.make_jaxpr(jax.grad(loss))(latents, rounded).jaxpr)
  assert (3, sizes.width, sizes.width) in {kernel.shape for kernel in kernels.values()}
  assert (sizes.width, sizes.width) in found and not found & {kernel.shape for kernel in kernels.values()}


def test_a_stage_that_trains_what_it_would_round_is_refused():
  config = config_with(STAGE2, frozen_weights="int8", trainable="^captioner/")
  with pytest.raises(
    ValueError, match=r"config\.generation_for_understanding: frozen_weights = 'int8': .* trains capt"
  ):
    check_stage(config, STAGE2, built())
  with pytest.raises(ValueError, match="expected one of"):
    ColdStartStage(frozen_weights="int4")
