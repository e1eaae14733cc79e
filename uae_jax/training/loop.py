"""The loop of one stage: batches in, metrics out, saves on the way, an orderly end when the machine is taken away."""

from collections.abc import Callable
import contextlib
import signal
import time

from absl import logging
import jax
import numpy as np

from uae_jax.training.checkpoints import Checkpoints
from uae_jax.training.metrics import MetricWriter
from uae_jax.training.stage import Stage

MAX_SKIPPED_IN_A_ROW = 20


class NonFiniteError(RuntimeError):
  """Loss or gradient was not finite too many times in a row; the last good state is saved."""


class Preempted(Exception):
  """SIGTERM came; the state is saved."""


@contextlib.contextmanager
def preemption_notice():
  """Yields a function that tells whether SIGTERM has come."""
  received = []
  previous = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
  try:
    yield lambda: bool(received)
  finally:
    signal.signal(signal.SIGTERM, previous)


def run(
  stage: Stage,
  section,
  folder: str,
  dataset,
  checkpoints: Checkpoints,
  writer: MetricWriter,
  plain_config: dict,
  is_preempted: Callable[[], bool],
  *,
  place: Callable[[dict], dict],
  observe: Callable[[int, dict], dict] | None = None,
  observe_every_steps: int = 0,
) -> dict:
  """Trains a stage to its end, from its newest checkpoint if there is one.

  Args:
    stage: step and first state.
    section: of the config.
    folder: name of the stage in this run.
    dataset: grain dataset of host batches.
    checkpoints: of this stage.
    writer: of metrics.
    plain_config: saved with every checkpoint.
    is_preempted: asked after every step.
    place: host batch -> device batch.
    observe: (step, params) -> more metrics, called every `observe_every_steps`; captions of held-out images, for
    instance.

  Returns:
    The parameters that the next stage starts from.

  Raises:
    Preempted: after saving.
    NonFiniteError: after saving.
  """
  state, iterator = stage.state, iter(dataset)
  restored = checkpoints.restore(state)
  if restored is not None:
    state, position = restored
    iterator.set_state(position)
    logging.info("%s: resuming after step %d", folder, int(state.step))
  step = int(state.step)
  writer.start_stage(folder, step=step, total_steps=section.total_steps)
  batch = None
  while step < section.total_steps:
    fetch = time.perf_counter()
    batch = place(next(iterator))
    seconds_data = time.perf_counter() - fetch
    if observe is not None and step % observe_every_steps == 0:
      writer.write(folder, step, observe(step, state.params))
    state, metrics = stage.step(state, batch)
    step += 1
    is_last = step == section.total_steps
    if step % section.log_every_steps == 0 or is_last:
      metrics = {name: float(np.asarray(value)) for name, value in metrics.items()}
      metrics["learning_rate"] = float(stage.learning_rate(step * stage.optimizer_steps))
      metrics["seconds_data"] = seconds_data
      writer.write(folder, step, metrics)
      if metrics["skipped_in_a_row"] >= MAX_SKIPPED_IN_A_ROW:
        checkpoints.save(step, state, iterator.get_state(), plain_config)
        checkpoints.close()
        raise NonFiniteError(
          f"{folder}: loss or gradient was not finite {int(metrics['skipped_in_a_row'])} times in a row, step {step}; "
          f"the last good state is saved in {checkpoints.directory}: lower config.{stage.name}.optimizer.learning_rate"
        )
    if is_preempted() and not is_last:
      checkpoints.save(step, state, iterator.get_state(), plain_config)
      checkpoints.close()
      raise Preempted(f"{folder}: saved at step {step}")
    if step % section.save_every_steps == 0 and not is_last:
      checkpoints.save(step, state, iterator.get_state(), plain_config)
  if observe is not None:
    writer.write(folder, step, observe(step, state.averaged_params))
  batch = batch if batch is not None else place(next(iterator))
  writer.end_stage()
  return stage.finish(jax.block_until_ready(state.averaged_params), batch["image"])
