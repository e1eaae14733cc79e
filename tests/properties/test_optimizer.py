"""Muon orthogonalizes the matrices that it is given, layer by layer, and leaves the rest to AdamW."""

import jax
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

from uae_jax import sharding, trees
from uae_jax.options import OptimizerOptions
from uae_jax.training.optimizer import learning_rate, make_optimizer
from uae_jax.training.placement import abstract_state
from uae_jax.training.state import create

RATE = 0.1
MATRICES = "layers/.*kernel$"


def make(muon=MATRICES):
  return make_optimizer(
    OptimizerOptions(learning_rate=RATE, schedule="constant", warmup_percent=0.0, clip_norm=1e9, muon=muon), 10
  )


def draw(**shapes):
  draws = np.random.default_rng(0)
  return trees.from_items((path, draws.normal(size=shape).astype(np.float32)) for path, shape in shapes.items())


def updates(optimizer, grads):
  return optimizer.update(grads, optimizer.init(grads), grads)[0]


def test_updates_of_matrices_are_orthogonal_of_adamw_size_and_each_by_itself():
  grads = draw(**{"layers/kernel": (3, 8, 16), "layers/bias": (3, 16), "out/kernel": (8, 16)})
  after = updates(make(), grads)
  singular = np.linalg.svd(after["layers"]["kernel"], compute_uv=False)
  # 0.2 sqrt(16) is the singular value for an RMS of 0.2. Five Newton-Schulz steps with Muon's coefficients end between
  # 0.68 and 1.13 of it, not closer: their polynomial trades accuracy for steepness at zero.
  singular /= RATE * 0.2 * 4.0
  assert 0.68 < np.min(singular) and np.max(singular) < 1.14
  alone = updates(make(), {"layers": {"kernel": grads["layers"]["kernel"][1]}})
  np.testing.assert_allclose(after["layers"]["kernel"][1], alone["layers"]["kernel"], rtol=1e-4, atol=1e-6)


def test_the_rest_is_adamw():
  grads = draw(**{"layers/kernel": (3, 8, 16), "layers/bias": (3, 16), "out/kernel": (8, 16)})
  after = updates(make(), grads)
  adamw = optax.adamw(RATE, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.0, nesterov=True)
  rest = {"layers": {"bias": grads["layers"]["bias"]}, "out": grads["out"]}
  expected = updates(adamw, rest)
  np.testing.assert_allclose(after["layers"]["bias"], expected["layers"]["bias"], rtol=1e-5)
  np.testing.assert_allclose(after["out"]["kernel"], expected["out"]["kernel"], rtol=1e-5)


def test_momentum_lies_as_its_matrix_does():
  mesh = sharding.make_mesh(data=1, fsdp=8, tensor=1)
  cut = jax.NamedSharding(mesh, PartitionSpec(None, "fsdp"))
  params = {"layers": {"kernel": jax.ShapeDtypeStruct((3, 8, 16), np.float32, sharding=cut)}}

  def init(params, key):
    return create(params, lambda path: True, make(), key, has_ema=False)

  state = abstract_state(init, params, mesh)
  copies = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == (3, 8, 16)]
  assert copies and all(leaf.sharding == cut for leaf in copies)


@pytest.mark.parametrize(
  ("pattern", "message"),
  [("^decoder/", "matches nothing that this stage trains"), ("bias", "matches layers/bias, shape (16,), which is no")],
)
def test_a_pattern_of_no_matrix_is_refused(pattern, message):
  with pytest.raises(ValueError) as error:
    make(pattern).init(draw(**{"layers/bias": (16,), "layers/kernel": (8, 16)}))
  assert f"optimizer.muon = {pattern!r} {message}" in str(error.value)


@pytest.mark.parametrize("end_factor", [0.0, 0.1])
def test_the_schedule_is_cosine_with_min_lr_of_transformers_but_for_its_first_step(end_factor):
  """Theirs warms up from 0 at step 0; ours from a tenth of the rate, as their step 1 has."""
  options = OptimizerOptions(learning_rate=RATE, schedule="cosine", warmup_percent=10.0, end_factor=end_factor)
  schedule, steps = learning_rate(options, 100), np.arange(10, 100)
  progress = (steps - 10) / (100 - 10)
  theirs = RATE * (end_factor + (1 - end_factor) * (1 + np.cos(np.pi * progress)) / 2)
  np.testing.assert_allclose([schedule(step) for step in steps], theirs, rtol=1e-5, atol=1e-8)
  warmup = [float(schedule(step)) for step in range(10)]
  np.testing.assert_allclose(warmup, RATE * (0.1 + 0.9 * np.arange(10) / 10), rtol=1e-5)
