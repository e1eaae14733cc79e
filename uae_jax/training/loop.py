"""The loop of one stage: batches in, metrics out, saves on the way, an orderly end when the machine is taken away."""

from collections.abc import Callable

from absl import logging
import jax
import numpy as np

from uae_jax.training.batches import Batches
from uae_jax.training.checkpoints import Checkpoints
from uae_jax.training.metrics import MetricWriter
from uae_jax.training.preemption import Preempted
from uae_jax.training.profiling import Profiler
from uae_jax.training.stage import ReadyStage
from uae_jax.training.state import release
from uae_jax.training.throughput import StepClock


class NonFiniteError(RuntimeError):
  """Loss or gradient was not finite too many times in a row; the last good state is saved."""


def run(
  stage: ReadyStage,
  section,
  folder: str,
  batches: Batches,
  checkpoints: Checkpoints,
  writer: MetricWriter,
  plain_config: dict,
  is_preempted: Callable[[], bool],
  *,
  profiler: Profiler,
  max_skipped_in_a_row: int,
  observe: Callable[[int, dict], dict] | None = None,
  observe_every_steps: int = 0,
) -> dict:
  """Trains a stage to its end, from its newest checkpoint if there is one.

  Args:
    stage: step and first state, whose memory is given to the states after it.
    section: of the config.
    folder: name of the stage in this run.
    batches: of the stage, on the mesh.
    checkpoints: of this stage.
    writer: of metrics.
    plain_config: saved with every checkpoint.
    is_preempted: asked after every step.
    profiler: of this stage.
    max_skipped_in_a_row: updates that may be skipped because loss or gradient is not finite; looked at when metrics are
      logged.
    observe: (step, params) -> more metrics, called every `observe_every_steps`; captions of held-out images, for
    instance.

  Returns:
    The parameters that the next stage starts from.

  Raises:
    Preempted: after saving.
    NonFiniteError: after saving.
    SaveError: a state could not be written; those before it are whole.
  """
  state = stage.state
  restored = checkpoints.restore(state)
  if restored is not None:
    state, position = restored
    release(stage.state, state)
    batches.set_state(position)
    logging.info("%s: resuming after step %d", folder, int(state.step))
  step = int(state.step)
  writer.start_stage(folder, step=step, total_steps=section.total_steps)
  batch = None
  # A policy loss does not measure progress, so RL stages have no target.
  target_loss = getattr(section, "target_loss", 0.0)
  clock = StepClock(lambda: stage.step.flops, num_rollouts=getattr(section.options, "num_rollouts", 1))

  def save(metrics: dict, *, wait: bool) -> None:
    checkpoints.save(step, state, batches.get_state(), plain_config, metrics)
    if wait:
      checkpoints.close()

  is_last = step >= section.total_steps
  while not is_last:
    if observe is not None and step % observe_every_steps == 0:
      with clock.paused(state):
        writer.write(folder, step, observe(step, state.averaged_params))
    with profiler.step(step + 1):
      with clock.phase("data"):
        batch = next(batches)
      state, metrics = stage.step(state, batch)
    step += 1
    clock.end_step(state, batch, metrics)
    profiler.end_step(step, state)
    is_last = step == section.total_steps
    if step % section.log_every_steps == 0 or is_last:
      metrics = {n: float(np.asarray(value)) for n, value in metrics.items() if not n.startswith("seconds_")}
      logged = metrics | {
        "learning_rate": float(stage.learning_rate(step * stage.optimizer_steps)),
        "bad_records": batches.num_bad(),
      }
      if target_loss:
        logged["loss_average"] = float(state.loss_average)
        is_last = is_last or logged["loss_average"] < target_loss
      logged |= clock.read(state)
      writer.write(folder, step, logged)
      if metrics["skipped_in_a_row"] >= max_skipped_in_a_row:
        save(metrics, wait=True)
        raise NonFiniteError(
          f"{folder}: loss or gradient was not finite {int(metrics['skipped_in_a_row'])} times in a row, step {step}; "
          f"the last good state is saved in {checkpoints.directory}: lower config.{stage.name}.optimizer.learning_rate"
        )
    if is_preempted() and not is_last:
      save(metrics, wait=True)
      raise Preempted(f"{folder}: saved at step {step}")
    if step % section.save_every_steps == 0 and not is_last:
      with clock.paused(state):
        save(metrics, wait=False)
  if observe is not None:
    writer.write(folder, step, observe(step, state.averaged_params))
  batch = batch if batch is not None else next(batches)
  writer.end_stage(step)
  return stage.finish(jax.block_until_ready(state.averaged_params), batch["image"])
