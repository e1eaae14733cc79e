"""Step times add up, exclude everything that is not a step, and give rates; an unknown peak gives no MFU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uae_jax.training import throughput
from uae_jax.training.throughput import StepClock

pytestmark = pytest.mark.fast

FLOPS = 6e9
CHIPS = 8  # Number of devices in the tests.


class Time:
  """A clock that only advances when told to."""

  def __init__(self):
    self.now = 100.0

  def perf_counter(self) -> float:
    return self.now


@pytest.fixture
def clock(monkeypatch):
  fake = Time()
  monkeypatch.setattr(throughput, "time", fake)
  return fake


def images(*leading) -> dict:
  return {"image": np.zeros((*leading, 2, 2, 3), np.uint8)}


def run_step(clock, measured, *, data=1.0, compute=3.0, metrics=None, batch=None):
  with measured.phase("data"):
    clock.now += data
  clock.now += compute
  measured.end_step(jnp.zeros(()), batch or images(4), metrics or {})


def test_the_first_step_is_left_out_and_the_others_are_averaged(clock):
  measured = StepClock(lambda: FLOPS)
  run_step(clock, measured, compute=1000.0)
  assert measured.read(jnp.zeros(())) == {}
  run_step(clock, measured)
  run_step(clock, measured, data=3.0)
  read = measured.read(jnp.zeros(()))
  assert read["seconds_step"] == 5.0
  assert read["seconds_data"] == 2.0
  assert read["images_per_second_per_chip"] == pytest.approx(8 / 10 / CHIPS)
  assert read["tflops_per_second_per_chip"] == pytest.approx(2 * FLOPS / 1e12 / 10 / CHIPS)
  # Intervals are independent.
  run_step(clock, measured)
  assert measured.read(jnp.zeros(()))["seconds_step"] == 4.0


def test_the_first_step_of_every_shape_is_left_out(clock):
  """Batches of another bucket have a program of their own, with its own FLOPs."""
  flops = {2: FLOPS, 4: 3 * FLOPS}
  done = []
  measured = StepClock(lambda: flops[done[-1]])
  for side, compute in ((2, 1000.0), (2, 3.0), (4, 500.0), (4, 7.0), (2, 3.0)):
    done.append(side)
    run_step(clock, measured, compute=compute, batch={"image": np.zeros((4, 2, side, 3), np.uint8)})
  read = measured.read(jnp.zeros(()))
  assert (read["seconds_step"], read["seconds_data"]) == (16.0 / 3, 1.0)
  assert read["tflops_per_second_per_chip"] == pytest.approx((1 + 3 + 1) * FLOPS / 1e12 / 16 / CHIPS)


def test_pauses_belong_to_no_step(clock):
  measured = StepClock(lambda: FLOPS)
  run_step(clock, measured)
  run_step(clock, measured)
  with measured.paused(jnp.zeros(())):
    clock.now += 50.0
  assert measured.read(jnp.zeros(()))["seconds_step"] == 4.0


def test_phases_and_tokens_of_rollouts(clock):
  measured = StepClock(lambda: FLOPS, num_rollouts=3)
  run_step(clock, measured)
  for length, rollout in ((5.0, 1.0), (7.0, 2.0)):
    metrics = {"caption_length": jnp.float32(length), "seconds_rollout": rollout, "loss": jnp.float32(0)}
    run_step(clock, measured, metrics=metrics)
  read = measured.read(jnp.zeros(()))
  assert read["seconds_rollout"] == 1.5
  assert read["tokens_per_second_per_chip"] == pytest.approx((5 + 7) * 4 * 3 / 8 / CHIPS)
  assert read["images_per_second_per_chip"] == pytest.approx(2 * 4 * 3 / 8 / CHIPS)
  assert "loss" not in read


def test_versions_of_a_scene_are_images_of_their_own(clock):
  measured = StepClock(lambda: FLOPS)
  for _ in range(2):
    run_step(clock, measured, batch=images(4, 5))
  assert measured.read(jnp.zeros(()))["images_per_second_per_chip"] == pytest.approx(20 / 4 / CHIPS)


def test_mfu_needs_a_known_peak(clock, monkeypatch):
  assert jax.devices()[0].device_kind not in throughput.PEAK_FLOPS
  for peaks in ({}, {jax.devices()[0].device_kind: 1e9}):
    monkeypatch.setattr(throughput, "PEAK_FLOPS", peaks)
    measured = StepClock(lambda: FLOPS)
    run_step(clock, measured)
    run_step(clock, measured)
    read = measured.read(jnp.zeros(()))
    if peaks:
      assert read["mfu"] == pytest.approx(FLOPS / 4.0 / CHIPS / 1e9)
    else:
      assert "mfu" not in read


def test_work_that_is_still_going_on_counts(clock, monkeypatch):
  """Steps return before the devices finish; a read or a pause waits for them, and that time belongs to the steps."""

  def wait(state):
    clock.now += 10.0
    return state

  measured = StepClock(lambda: FLOPS)
  run_step(clock, measured)
  run_step(clock, measured)
  monkeypatch.setattr(jax, "block_until_ready", wait)
  with measured.paused(jnp.zeros(())):
    clock.now += 50.0
  assert measured.read(jnp.zeros(()))["seconds_step"] == 4.0 + 10.0 + 10.0
