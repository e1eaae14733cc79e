"""The training loop of one stage: steps, metrics, checkpoints, and a saved state on preemption."""

from collections.abc import Callable, Sequence

from absl import logging
import jax
import numpy as np

from uae_jax.training.batches import Batches
from uae_jax.training.checkpoints import Checkpoints
from uae_jax.training.inspection import ADVICE, NonFiniteError
from uae_jax.training.metrics import MetricWriter
from uae_jax.training.preemption import Preempted
from uae_jax.training.profiling import Profiler
from uae_jax.training.stage import ReadyStage
from uae_jax.training.state import release
from uae_jax.training.throughput import StepClock
from uae_jax.training.watchdog import Watchdog

# (step, averaged parameters) -> further metrics, such as those of captions of held-out images.
Observe = Callable[[int, dict], dict]


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
  observers: Sequence[tuple[int, Observe]] = (),
  watchdog: Watchdog | None = None,
) -> dict:
  """Trains a stage to its end, from its newest checkpoint if there is one.

  Args:
    stage: step function and first state; the buffers of the state are donated to later states.
    section: the stage's section of the config.
    folder: name of the stage's folder, `<stage>` or `<stage>_round<k>`.
    batches: iterator over batches on the mesh.
    checkpoints: checkpoints of this stage.
    writer: receives the metrics.
    plain_config: plain config of the run, saved with every checkpoint.
    is_preempted: () -> whether to save and stop; called after every step.
    profiler: records traces of chosen steps.
    max_skipped_in_a_row: number of updates in a row with a non-finite loss or gradient that ends the run; checked when
      metrics are logged.
    observers: (number of steps between calls, function); they are also called after the last step.
    watchdog: receives a heartbeat after every step; None: there is none.

  Returns:
    The parameters that the next stage starts from.

  Raises:
    Preempted: the run was preempted; the state is saved if it is good.
    NonFiniteError: too many updates were skipped, or the state to save is not finite; the last good one stays.
    SaveError: a state could not be written; earlier checkpoints remain intact.
  """
  watchdog = watchdog or Watchdog(0)
  watchdog.grace()
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
  clock = StepClock(lambda: stage.step.flops, num_rollouts=getattr(section.options, "images_per_prompt", 1))

  def save(metrics: dict) -> bool:
    """Saves the state, unless the loss or the gradient of its last update was not finite."""
    is_good = float(np.asarray(metrics["skipped_in_a_row"])) == 0 and np.isfinite(np.asarray(metrics["loss"]))
    if is_good:
      checkpoints.save(step, state, batches.get_state(), plain_config, metrics)
    return bool(is_good)

  is_save_due, is_last = False, step >= section.total_steps
  while not is_last:
    for observe in (observe for every_steps, observe in observers if step % every_steps == 0):
      watchdog.grace()
      with clock.paused(state):
        writer.write(folder, step, observe(step, state.averaged_params))
    with profiler.step(step + 1):
      with clock.phase("data"):
        batch = next(batches)
      state, metrics = stage.step(state, batch)
    step += 1
    clock.end_step(state, batch, metrics)
    watchdog.beat()
    profiler.end_step(step, state)
    is_last = step == section.total_steps
    if step % section.log_every_steps == 0 or is_last:
      metrics = {n: float(np.asarray(value)) for n, value in metrics.items() if not n.startswith("seconds_")}
      logged = metrics | {
        "learning_rate": float(stage.learning_rate(step * stage.optimizer_steps)),
        **batches.counts(),
      }
      if target_loss:
        logged["loss_average"] = float(state.loss_average)
        is_last = is_last or logged["loss_average"] < target_loss
      logged |= clock.read(state)
      writer.write(folder, step, logged)
      if metrics["skipped_in_a_row"] >= max_skipped_in_a_row:
        raise NonFiniteError(
          f"{folder}: loss or gradient was not finite {int(metrics['skipped_in_a_row'])} times in a row, step {step}; "
          f"{checkpoints.last_saved()}: {ADVICE}"
        )
    if is_preempted() and not is_last:
      watchdog.grace()
      is_saved = save(metrics)
      checkpoints.close()
      raise Preempted(f"{folder}: {f'saved at step {step}' if is_saved else checkpoints.last_saved()}")
    is_save_due = is_save_due or step % section.save_every_steps == 0
    if is_save_due and not is_last:
      watchdog.grace()
      with clock.paused(state):
        # A step that is not good is not saved over a good one; the next one is tried instead.
        is_save_due = not save(metrics)
  watchdog.grace()
  for _, observe in observers:
    writer.write(folder, step, observe(step, state.averaged_params))
  batch = batch if batch is not None else next(batches)
  writer.end_stage(step)
  return stage.finish(jax.block_until_ready(state.averaged_params), batch["image"])
