"""A torn step is set aside and the one before it is used; updates that are not finite are skipped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uae_jax.training.checkpoints import Checkpoints
from uae_jax.training.optimizer import OptimizerOptions, make_optimizer
from uae_jax.training.state import apply_gradients, create

CONFIG = {"seed": 0}


def optimizer():
  return make_optimizer(OptimizerOptions(0.1, schedule="constant"), 10)


def fresh_state():
  params = {"net": {"kernel": jnp.arange(2000.0), "bias": jnp.zeros(3)}}
  return create(params, lambda path: path.endswith("kernel"), optimizer(), jax.random.key(0), has_ema=True)


def advance(state, steps: int):
  for i in range(steps):
    state, _ = apply_gradients(state, {"net": {"kernel": jnp.full(2000, 1.0 + i)}}, jnp.float32(1.0), optimizer())
  return state


def assert_same(ours, theirs):
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    np.testing.assert_array_equal(a, b)


@pytest.fixture
def two_steps(tmp_path):
  """(folder, state after step 2, state after step 4), both saved."""
  checkpoints = Checkpoints(tmp_path / "stage")
  second = advance(fresh_state(), 2)
  fourth = advance(second, 2)
  checkpoints.save(2, second, {"position": 2}, CONFIG)
  checkpoints.save(4, fourth, {"position": 4}, CONFIG)
  checkpoints.close()
  return tmp_path / "stage", second, fourth


def test_the_newest_state_comes_back_whole(two_steps):
  folder, _, fourth = two_steps
  state, data = Checkpoints(folder).restore(fresh_state())
  assert data == {"position": 4}
  assert_same(state, fourth)


@pytest.mark.parametrize("item", ["state", "data"])
def test_a_torn_step_is_set_aside_for_the_one_before(two_steps, item):
  folder, second, fourth = two_steps
  for file in (folder / "4" / item).rglob("*"):
    if file.is_file():
      file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  checkpoints = Checkpoints(folder)
  state, data = checkpoints.restore(fresh_state())
  assert data == {"position": 2}
  assert_same(state, second)
  assert (folder / "4.damaged").exists()
  # The run comes to step 4 again.
  checkpoints.save(4, fourth, {"position": 4}, CONFIG)
  checkpoints.close()
  assert_same(Checkpoints(folder).restore(fresh_state())[0], fourth)


def test_the_result_of_a_stage_replaces_its_last_state(two_steps):
  folder, _, fourth = two_steps
  checkpoints = Checkpoints(folder)
  checkpoints.save_final(4, fourth.params, CONFIG)
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), fourth.params)
  assert_same(Checkpoints(folder).restore_final(abstract), fourth.params)


def test_non_finite_updates_are_skipped_and_counted():
  state = create(
    {"net": {"kernel": np.ones(3, np.float32)}}, lambda path: True, optimizer(), jax.random.key(0), has_ema=True
  )
  bad, _ = apply_gradients(state, {"net": {"kernel": np.full(3, np.nan, np.float32)}}, np.float32(1.0), optimizer())
  worse, metrics = apply_gradients(bad, {"net": {"kernel": np.ones(3, np.float32)}}, np.float32(np.inf), optimizer())
  np.testing.assert_array_equal(worse.trainable["net"]["kernel"], np.ones(3))
  assert int(worse.step) == 2 and metrics["skipped_in_a_row"] == 2
  good, metrics = apply_gradients(worse, {"net": {"kernel": np.ones(3, np.float32)}}, np.float32(1.0), optimizer())
  assert metrics["skipped_in_a_row"] == 0
  assert np.all(np.asarray(good.trainable["net"]["kernel"]) < 1.0)
