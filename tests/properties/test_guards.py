"""Non-finite updates are skipped and counted, and end the run after n in a row; spikes are skipped but never end it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uae_jax.options import OptimizerOptions
from uae_jax.training.optimizer import make_optimizer
from uae_jax.training.state import apply_gradients, create


def make(**options):
  return make_optimizer(OptimizerOptions(learning_rate=0.1, schedule="constant", **options), 10)


def fresh_state(optimizer):
  params = {"net": {"kernel": np.ones(3, np.float32)}}
  return create(params, lambda path: True, optimizer, jax.random.key(0), has_ema=True)


def step(state, gradient, optimizer, loss=1.0):
  return apply_gradients(state, {"net": {"kernel": jnp.full(3, gradient)}}, jnp.float32(loss), optimizer)


def kernel(state) -> np.ndarray:
  return np.asarray(state.trainable["net"]["kernel"])


def test_non_finite_updates_are_skipped_and_counted():
  optimizer = make()
  bad, _ = step(fresh_state(optimizer), np.nan, optimizer)
  worse, metrics = step(bad, 1.0, optimizer, loss=np.inf)
  np.testing.assert_array_equal(kernel(worse), np.ones(3))
  assert int(worse.step) == 2 and metrics["skipped_in_a_row"] == 2
  good, metrics = step(worse, 1.0, optimizer)
  assert metrics["skipped_in_a_row"] == 0
  assert np.all(kernel(good) < 1.0)


def test_spikes_are_skipped_and_counted():
  optimizer = make(spike_factor=3.0)
  state, _ = step(fresh_state(optimizer), 1.0, optimizer)
  spiked, metrics = step(state, 4.0, optimizer)
  np.testing.assert_array_equal(kernel(spiked), kernel(state))
  assert metrics["spikes_skipped"] == 1 and metrics["skipped_in_a_row"] == 0
  # Adam's moments are unchanged, too.
  for before, after in zip(*(jax.tree.leaves(s.opt_state.inner) for s in (state, spiked)), strict=True):
    np.testing.assert_array_equal(before, after)
  after, metrics = step(spiked, 2.0, optimizer)
  assert np.all(kernel(after) < kernel(spiked)) and metrics["spikes_skipped"] == 1


def test_a_lasting_rise_of_the_norm_is_let_through():
  optimizer = make(spike_factor=2.0)
  state, _ = step(fresh_state(optimizer), 1.0, optimizer)
  skipped = []
  for _ in range(30):
    state, metrics = step(state, 10.0, optimizer)
    skipped.append(float(metrics["spikes_skipped"]))
  assert skipped[0] == 1
  assert skipped[-1] == skipped[-2] < 20


def test_a_nan_leaves_the_average_of_the_norm_alone():
  optimizer = make(spike_factor=3.0)
  state, _ = step(fresh_state(optimizer), 1.0, optimizer)
  after, metrics = step(state, np.nan, optimizer)
  assert after.opt_state.average == state.opt_state.average
  assert metrics["skipped_in_a_row"] == 1 and metrics["spikes_skipped"] == 0


def test_without_a_factor_nothing_is_a_spike():
  optimizer = make()
  state, _ = step(fresh_state(optimizer), 1e-3, optimizer)
  after, metrics = step(state, 1e6, optimizer)
  assert np.all(kernel(after) < kernel(state))
  assert "spikes_skipped" not in metrics


def test_a_factor_that_would_skip_ordinary_updates_is_refused():
  with pytest.raises(ValueError, match=r"spike_factor = 0\.5: expected 0 to disable it, or more than 1"):
    make(spike_factor=0.5)
