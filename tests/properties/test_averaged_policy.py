"""With `ema_decay` the moving average is observed, evaluated and handed on; the live policy is only trained."""

from pathlib import Path
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax

from uae_jax.algorithms.losses import Loss
from uae_jax.training import loop, supervised
from uae_jax.training.flops import Program
from uae_jax.training.profiling import Profiler
from uae_jax.training.stage import ReadyStage
from uae_jax.training.state import create

CEILING, STEPS = 0.3, 4


class Nothing:
  """Fake checkpoints, batches and writer without any effect."""

  directory = ""

  def __next__(self):
    return {"image": np.zeros(1)}

  def restore(self, state):
    del state

  def counts(self):
    return {"bad_records": 0.0}

  def start_stage(self, *_, **__):
    pass

  write = end_stage = start_stage


def test_the_average_is_observed_and_handed_on():
  optimizer = optax.sgd(1.0)
  state = create({"w": jnp.zeros(())}, lambda _: True, optimizer, jax.random.key(0), has_ema=True)
  # Every update adds 1 to the parameter.
  step = Program(supervised.make_step(lambda params, *_: (Loss(-params["w"], 1.0), {}), optimizer, ema_decay=CEILING))
  stage = ReadyStage("stage", step, state, lambda _: 0.0, 1, lambda params, images: params)
  section = types.SimpleNamespace(
    total_steps=STEPS, target_loss=0.0, log_every_steps=1, save_every_steps=100, options={}
  )
  seen = []

  def observe(step, params):
    seen.append(float(params["w"]))
    return {}

  result = loop.run(
    stage,
    section,
    "stage",
    Nothing(),
    Nothing(),
    Nothing(),
    {},
    lambda: False,
    profiler=Profiler(Path(), first_step=1, num_steps=0),
    max_skipped_in_a_row=20,
    observers=[(1, observe)],
  )
  expected = [0.0]
  for n in range(STEPS):
    decay = min((1 + n) / (10 + n), CEILING)
    expected.append(decay * expected[-1] + (1 - decay) * (n + 1))
  np.testing.assert_allclose(seen, expected, rtol=1e-6)
  np.testing.assert_allclose(result["w"], expected[-1], rtol=1e-6)
  assert expected[-1] != STEPS
