"""The loop of a stage on a model of three numbers: exact resume, stop on NaNs, preemption, counts of bad records."""

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uae_jax import sharding
from uae_jax.options import OptimizerOptions
from uae_jax.training import loop
from uae_jax.training.checkpoints import Checkpoints
from uae_jax.training.flops import Program
from uae_jax.training.metrics import MetricWriter
from uae_jax.training.optimizer import make_optimizer
from uae_jax.training.preemption import Preempted, PreemptionNotice
from uae_jax.training.profiling import Profiler
from uae_jax.training.stage import ReadyStage
from uae_jax.training.state import apply_gradients, create


class Section:
  total_steps = 7
  log_every_steps = 1
  save_every_steps = 2
  options = {}


class Counting:
  """Batches 0, 1, 2, ...; three of them are reported as bad."""

  def __init__(self):
    self.next = 0

  def __next__(self):
    self.next += 1
    return {"image": jnp.full(3, self.next - 1.0)}

  def get_state(self):
    return {"next": self.next}

  def set_state(self, state):
    self.next = state["next"]

  def counts(self):
    return {"bad_records": 3.0}


OPTIMIZER = make_optimizer(OptimizerOptions(learning_rate=0.1, schedule="constant"), 10)


def make_stage(nan_from: int = 1000, nan_at: tuple[int, ...] = ()) -> ReadyStage:
  """Gradients are noise around the batch; the loss is NaN after `nan_from` steps, and in the steps `nan_at`."""

  def step(state, batch):
    noise = jax.random.normal(jax.random.fold_in(state.rng, state.step), (3,))
    is_nan = (state.step >= nan_from) | jnp.isin(state.step + 1, jnp.asarray(nan_at, jnp.int32))
    loss = jnp.where(is_nan, jnp.nan, jnp.mean(noise))
    state, metrics = apply_gradients(state, {"kernel": noise + batch["image"]}, loss, OPTIMIZER, ema_decay=0.9)
    return state, {"loss": loss, **metrics}

  state = create({"kernel": jnp.zeros(3)}, lambda path: True, OPTIMIZER, jax.random.key(1), has_ema=True)
  return ReadyStage("toy", Program(step), state, lambda step: 0.1, 1, lambda params, images: params)


def run(workdir, is_preempted=lambda: False, stage: ReadyStage | None = None, target_loss=0.0, section=None, **options):
  checkpoints = Checkpoints(workdir / "checkpoints" / "toy")
  writer = MetricWriter(workdir, tensorboard=False)
  try:
    stage = stage or make_stage(**options)
    profiler = Profiler(workdir / "profile", first_step=1, num_steps=0)
    options = {"profiler": profiler, "max_skipped_in_a_row": 2}
    section = section or Section()
    section.target_loss = target_loss
    return loop.run(stage, section, "toy", Counting(), checkpoints, writer, {}, is_preempted, **options)
  finally:
    writer.close()
    checkpoints.close()


def lines(workdir) -> list[dict]:
  records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [{name: value for name, value in record.items() if "second" not in name} for record in records]


def test_a_preempted_run_ends_as_if_it_had_not_been(tmp_path):
  whole = run(tmp_path / "whole")
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  steps = []
  with PreemptionNotice(mesh) as notice:

    def asked():
      steps.append(None)
      if len(steps) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
      return notice()

    with pytest.raises(Preempted, match="saved at step 3"):
      run(tmp_path / "torn", asked)
  stage = make_stage()
  resumed = run(tmp_path / "torn", stage=stage)
  np.testing.assert_array_equal(resumed["kernel"], whole["kernel"])
  assert lines(tmp_path / "torn") == lines(tmp_path / "whole")
  assert {line["bad_records"] for line in lines(tmp_path / "whole")} == {3.0}
  # The initial state is released once the checkpoint has been read.
  assert [path for path, leaf in jax.tree.leaves_with_path(stage.state) if not leaf.is_deleted()] == []


def test_a_stage_ends_when_its_loss_averages_less_than_the_target(tmp_path):
  run(tmp_path / "whole")
  losses = [line["loss"] for line in lines(tmp_path / "whole")]
  averages = [losses[0]]
  for loss in losses[1:]:
    averages.append(averages[-1] + 0.01 * (loss - averages[-1]))
  lowest = int(np.argmin(averages[:-1]))
  target = averages[lowest] + 1e-6
  assert 0 < lowest and target < min(averages[:lowest])
  reached = run(tmp_path / "reached", target_loss=target)
  told = lines(tmp_path / "reached")
  np.testing.assert_allclose([line.pop("loss_average") for line in told], averages[: lowest + 1], rtol=1e-5)
  assert told == lines(tmp_path / "whole")[: lowest + 1]
  state, batches, step = make_stage().state, Counting(), make_stage().step
  for _ in range(lowest + 1):
    state, _ = step(state, next(batches))
  np.testing.assert_array_equal(reached["kernel"], state.averaged_params["kernel"])


def test_a_notice_ends_what_has_nothing_unsaved_at_once():
  with PreemptionNotice(sharding.make_mesh(devices=jax.devices()[:1])) as notice:
    with pytest.raises(Preempted):
      with notice.nothing_unsaved():
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the notice did not end the block")
    with pytest.raises(Preempted):
      with notice.nothing_unsaved():
        raise AssertionError("the notice was forgotten")


def saved_steps(workdir) -> list[int]:
  return sorted(int(path.name) for path in (workdir / "checkpoints" / "toy").iterdir() if path.name.isdigit())


def test_nans_in_a_row_stop_the_run_with_its_last_good_state(tmp_path):
  """States after steps 4 and 6 are due; the updates of steps 5 and 6 were skipped."""
  with pytest.raises(
    loop.NonFiniteError, match=r"not finite 2 times in a row, step 6; the last good state is .* 4: lower"
  ):
    run(tmp_path / "nan", nan_from=4)
  assert saved_steps(tmp_path / "nan") == [2, 4]
  # The same command does not replace good states either, however often it is started.
  with pytest.raises(loop.NonFiniteError):
    run(tmp_path / "nan", nan_from=4)
  state, position = Checkpoints(tmp_path / "nan" / "checkpoints" / "toy").restore(make_stage().state)
  assert int(state.step) == 4 and position == {"next": 4}


def test_a_save_is_postponed_to_the_next_good_step(tmp_path):
  class Now(Section):
    save_every_steps = 3

  stage = make_stage(nan_at=(3,))
  run(tmp_path, stage=stage, section=Now())
  # Step 3 was skipped, so step 4 was saved for it; step 6 is due as always.
  assert saved_steps(tmp_path) == [4, 6]


@pytest.mark.parametrize("part", ["trainable", "ema", "opt_state"])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, part):
  """The update overflows in step 4, whose loss and gradient are finite."""
  whole = make_stage()

  def step(state, batch):
    state, metrics = whole.step(state, batch)
    broken = jax.tree.map(lambda x: x * jnp.where(state.step == 4, jnp.inf, 1).astype(x.dtype), getattr(state, part))
    return dataclasses.replace(state, **{part: broken}), metrics

  with pytest.raises(loop.NonFiniteError, match="not finite after step 4, they are not saved; the last good .* step 2"):
    run(tmp_path, stage=dataclasses.replace(whole, step=Program(step)))
  assert saved_steps(tmp_path) == [2]


def test_sigterm_in_a_bad_step_saves_nothing_over_a_good_one(tmp_path):
  answers = iter([False] * 4 + [True])
  with pytest.raises(Preempted, match="the last good state is that of step 4"):
    run(tmp_path, lambda: next(answers), nan_from=4)
  assert saved_steps(tmp_path) == [2, 4]
