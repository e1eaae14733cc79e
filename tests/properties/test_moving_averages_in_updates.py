"""Averages of the policy in `run_updates`: the EMA counts optimizer steps, the moving reference counts rollouts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from uae_jax.options import ReferenceOptions, UpdateOptions
from uae_jax.training.rl.update import run_updates
from uae_jax.training.state import create

pytestmark = pytest.mark.fast


def run(num_rollouts, *, num_minibatches=1, **options):
  """States after each rollout; every optimizer step adds 1 to the only parameter."""
  optimizer = optax.sgd(1.0)
  state = create(
    {"w": jnp.float32(0.0)}, lambda _: True, optimizer, jax.random.key(0), has_ema=True, has_reference=True
  )

  def objective(params, microbatch, known):
    count = jnp.float32(microbatch.shape[0])
    return (-params["w"] * count, count), {}

  @jax.jit
  def step(state):
    update = UpdateOptions(num_minibatches=num_minibatches)
    return run_updates(state, jnp.zeros((4, 1)), objective, update, optimizer, **options)[0]

  states = []
  for _ in range(num_rollouts):
    state = step(state)
    states.append(state)
  return states


@pytest.mark.parametrize("num_minibatches", [1, 2])
def test_the_average_has_the_cadence_of_flow_grpo(num_minibatches):
  """decay min((1 + n) / (10 + n), 0.9) after each eighth optimizer step, n optimizer steps before it."""
  states = run(40, num_minibatches=num_minibatches, ema_decay=0.9, ema_interval=8)
  expected, average = [], 0.0
  for n in range(40 * num_minibatches):
    if (n + 1) % 8 == 0:
      decay = min((1 + n) / (10 + n), 0.9)
      average = decay * average + (1 - decay) * (n + 1)
    if (n + 1) % num_minibatches == 0:
      expected.append(average)
  np.testing.assert_allclose([state.ema["w"] for state in states], expected, rtol=1e-5)


def test_the_reference_moves_at_its_interval():
  states = run(7, reference=ReferenceOptions(interval=3, alpha=0.6))
  expected, reference = [], 0.0
  for n in range(1, 8):
    if n % 3 == 0:
      reference = 0.6 * n + 0.4 * reference
    expected.append(reference)
  np.testing.assert_allclose([state.reference["w"] for state in states], expected, rtol=1e-6)


def test_a_reference_without_an_interval_stays():
  assert float(run(3)[-1].reference["w"]) == float(run(3, reference=ReferenceOptions())[-1].reference["w"]) == 0.0
